"""Weights of many small networks side by side, so that one batched product per stage does them all.

A *row* is the keys, or the values, of one receiver layer. Rows of one shape (heads, dim) stand in one `Bank`: in
ordinary models that is every layer's keys and values; ragged models have a bank for each shape.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kvferry.kv import KV, Geometry

Side = int
"""0 for keys, 1 for values."""


@dataclass(frozen=True)
class Block:
    """The rows that one tensor of a `KV` makes: keys or values of the layers of one group."""

    group: int
    side: Side
    layers: tuple[int, ...]


def blocks_by_shape(geometry: Geometry) -> dict[tuple[int, int], list[Block]]:
    """`(heads, dim)` -> the blocks of that shape, in the order of a cache's groups."""
    found: dict[tuple[int, int], list[Block]] = {}
    for number, members in enumerate(geometry.groups()):
        layer = geometry.layers[members[0]]
        for side, dim in enumerate((layer.key_dim, layer.value_dim)):
            found.setdefault((layer.heads, dim), []).append(Block(number, side, members))
    return found


class Bank(nn.Module):
    """A two-layer perceptron for each row. In: the row's own token and what arrived. Out: a residual for the token.

        hidden   = gelu(own @ own_in + latent @ latent_in + bias_in)       [rows, tokens, rank]
        weight   = gate * sigmoid(hidden @ weight + weight_bias)           [rows, heads, tokens]
        residual = (weight * hidden) @ content                             [rows, heads, tokens, dim]

    Own channels are standardised on the way in, and the residual is in units of the channel's deviation; both is done
    to the weights, which are smaller than the activations. So is the head's weight applied before `content`.
    """

    layer_of: Tensor
    side_of: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: tuple[int, int], blocks: list[Block], width: int, rank: int) -> None:
        super().__init__()
        self.blocks, (heads, dim) = blocks, shape
        rows = torch.tensor([(layer, block.side) for block in blocks for layer in block.layers])
        self.register_buffer("layer_of", rows[:, 0], persistent=False)
        self.register_buffer("side_of", rows[:, 1], persistent=False)
        self.register_buffer("mean", torch.zeros(len(rows), heads, dim))
        self.register_buffer("deviation", torch.ones(len(rows), heads, dim))
        self.own_in = nn.Parameter(torch.randn(len(rows), heads, dim, rank) / math.sqrt(heads * dim))
        self.latent_in = nn.Parameter(torch.randn(len(rows) * rank, width) / math.sqrt(width))
        self.bias_in = nn.Parameter(torch.zeros(len(rows), rank))
        self.weight = nn.Parameter(torch.randn(len(rows), heads, rank) / math.sqrt(rank))
        self.weight_bias = nn.Parameter(torch.zeros(len(rows), heads, 1))
        # Content starts at zero: an untrained fuser changes nothing. Its gradient does not.
        self.content = nn.Parameter(torch.zeros(len(rows), heads, rank, dim))

    def forward(
        self,
        own: KV,
        latent: Float[Tensor, "batch tokens width"],
        gate: Float[Tensor, "all_layers 2 batch"],
    ) -> dict[tuple[int, Side], Float[Tensor, "layers batch heads tokens dim"]]:
        """The residual of each block, by group and side."""
        hidden = functional.gelu(self._hidden(self.gather(own), latent.flatten(0, 1)))
        weight = torch.baddbmm(self.weight_bias, self.weight, hidden.transpose(1, 2)).sigmoid()
        strength = weight * gate[self.layer_of, self.side_of].repeat_interleave(own.n_tokens, 1).unsqueeze(1)
        spread = strength.unsqueeze(-1) * hidden.unsqueeze(1)
        content = self.content * self.deviation.unsqueeze(2)
        residual = torch.bmm(spread.flatten(0, 1), content.flatten(0, 1))
        return self._split(residual.view(*spread.shape[:2], own.n_batch, own.n_tokens, -1).transpose(1, 2))

    def gather(self, own: KV) -> Float[Tensor, "rows batch heads tokens dim"]:
        """The rows' own numbers, zero where a layer does not hold the token: absent slots may hold anything."""
        parts = [(own.groups[b.group].values if b.side else own.groups[b.group].keys) for b in self.blocks]
        rows = torch.cat([part.to(self.own_in.dtype) for part in parts])
        return rows.masked_fill_(~own.present[self.layer_of][:, :, None, :, None], 0)

    def _hidden(
        self, own: Float[Tensor, "rows batch heads tokens dim"], latent: Float[Tensor, "slots width"]
    ) -> Float[Tensor, "rows slots rank"]:
        own_in = self.own_in / self.deviation.unsqueeze(-1)
        bias = self.bias_in - torch.einsum("rhd,rhdk->rk", self.mean, own_in)
        heard = functional.linear(latent, self.latent_in).unflatten(1, bias.shape).transpose(0, 1)
        by_head = torch.bmm(own.transpose(1, 2).flatten(2, 3).flatten(0, 1), own_in.flatten(0, 1))
        return by_head.unflatten(0, own_in.shape[:2]).sum(1) + heard + bias.unsqueeze(1)

    def _split(self, rows: Float[Tensor, "rows batch heads tokens dim"]) -> dict[tuple[int, Side], Tensor]:
        parts = rows.split([len(block.layers) for block in self.blocks])
        return {(block.group, block.side): part for block, part in zip(self.blocks, parts, strict=True)}
