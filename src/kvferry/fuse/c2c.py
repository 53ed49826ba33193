"""Cache-to-Cache as published (arXiv:2510.03215), the baseline: one projector per receiver layer, on rotated keys.

The residual alone is computed here, and added by whoever calls; the sum is the published one. Kept as they are: one
Gumbel as gate noise (which opens gates: P(gate > 1/2) is .63 at logit 0), drawn per token and head for a gate per
layer; gates at logit 0 when fresh, which is closed in evaluation; temperature falling geometrically, where the paper
says linearly; the clamped layer map, which lets several receiver layers read the sender's first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kvferry.errors import UsageError
from kvferry.fuse.contract import Fuser
from kvferry.kv import KV, Geometry, Group, KeySpace

HARDEST = 0.001
"""Temperature at the end of training, from 1."""


@dataclass(frozen=True)
class Sizes:
    """Widths and depth of every projector; defaults are the published ones."""

    hidden: int = 1024
    inner: int = 1024
    depth: int = 3
    dropout: float = 0.1


class FeedForward(nn.Module):
    """`x + dropout(down(gelu(up(rmsnorm(x)))))`, without biases."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))


class Branch(nn.Module):
    """Keys or values of one layer: `gate * sigmoid(weight) * content`, from own and arrived heads side by side."""

    def __init__(self, n_arrived: int, heads: int, dim: int, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        hidden, inner, dropout = sizes.hidden, sizes.inner, sizes.dropout
        self.entry = nn.Linear(n_arrived + heads * dim, hidden)
        self.shared = nn.Sequential(FeedForward(hidden, inner, dropout))
        self.weigher = nn.Sequential(FeedForward(hidden, hidden, dropout))
        self.weight = nn.Linear(hidden, heads)
        deeper = (FeedForward(hidden, inner, dropout) for _ in range(sizes.depth - 2))
        self.projector = nn.Sequential(*deeper)
        self.content = nn.Linear(hidden, heads * dim)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(
        self, own: Tensor, arrived: Tensor, temperature: Tensor
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Both `[batch, heads, tokens, dim]`, each with its own heads and dim."""
        both = torch.cat([arrived.transpose(1, 2).flatten(2), own.transpose(1, 2).flatten(2)], -1)
        shared = self.shared(self.entry(both.to(self.entry.weight.dtype)))
        content = self.content(self.projector(shared)).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        weight = self.weight(self.weigher(shared)).sigmoid().transpose(1, 2).unsqueeze(-1)
        return self._gate(weight, temperature) * weight * content

    def _gate(self, weight: Float[Tensor, "batch heads tokens 1"], temperature: Tensor) -> Tensor:
        if not self.training:
            return (self.gate > 0).float()
        noise = -torch.rand_like(weight).clamp(min=1e-20).log()
        return ((self.gate - noise.clamp(min=1e-20).log()) / temperature).sigmoid()


class Projector(nn.Module):
    """Keys and values of one receiver layer."""

    def __init__(self, key: Branch, value: Branch) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(
        self, own: tuple[Tensor, Tensor], arrived: tuple[Tensor, Tensor], temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.key(own[0], arrived[0], temperature), self.value(own[1], arrived[1], temperature)


class C2CFuser(Fuser):
    """The published fuser. `sources[t]` is the sender layer that receiver layer t reads (default: `last_aligned`)."""

    name: ClassVar[str] = "c2c"
    space: ClassVar[KeySpace] = "rotated"

    temperature: Tensor

    def __init__(
        self,
        sender: Geometry,
        receiver: Geometry,
        hidden: int = 1024,
        inner: int = 1024,
        depth: int = 3,
        dropout: float = 0.1,
        sources: Sequence[int] | None = None,
    ) -> None:
        super().__init__(sender, receiver)
        self.sizes = Sizes(hidden, inner, depth, dropout)
        self.sources = list(sources or last_aligned(sender.n_layers, receiver.n_layers))
        if len(self.sources) != receiver.n_layers or not set(self.sources) <= set(range(sender.n_layers)):
            cure = f"Give one of {sender.n_layers} sender layers for each of {receiver.n_layers}"
            raise UsageError(f"sources are {self.sources}", cure=cure)
        if depth < 3:
            raise UsageError(f"depth is {depth}", cure="Give at least 3, as published")
        self.register_buffer("temperature", torch.ones(()))
        self.projectors = nn.ModuleList(self._projector(layer) for layer in range(receiver.n_layers))

    def options(self) -> dict[str, Any]:
        sizes = self.sizes
        widths = {"hidden": sizes.hidden, "inner": sizes.inner, "depth": sizes.depth}
        return {**widths, "dropout": sizes.dropout, "sources": self.sources}

    def anneal(self, progress: float) -> None:
        """Temperature from 1 down to a thousandth, geometrically."""
        super().anneal(progress)
        self.temperature.fill_(HARDEST**progress)

    def forward(self, own: KV, arrived: KV) -> KV:
        self.require_models(own, arrived)
        self.require_same_tokens(own, arrived)
        parts = [self._layer(own, arrived, layer) for layer in range(own.geometry.n_layers)]
        groups = tuple(
            Group(g.layers, *(torch.stack([parts[i][side] for i in g.layers]) for side in (0, 1)))
            for g in own.groups
        )
        return replace(own, groups=groups, present=own.present & arrived.present[self.sources])

    def _layer(self, own: KV, arrived: KV, layer: int) -> tuple[Tensor, Tensor]:
        heard = _cleared(arrived, self.sources[layer])
        return self.projectors[layer](_cleared(own, layer), heard, self.temperature)

    def _projector(self, layer: int) -> Projector:
        own, heard = self.receiver.layers[layer], self.sender.layers[self.sources[layer]]
        dims = ((heard.heads * heard.key_dim, own.key_dim), (heard.heads * heard.value_dim, own.value_dim))
        return Projector(*(Branch(n, own.heads, dim, self.sizes) for n, dim in dims))


def last_aligned(n_sender: int, n_receiver: int) -> list[int]:
    """The last layers correspond, and so on down; receiver layers below the sender's first all read that one.

    >>> last_aligned(3, 5), last_aligned(4, 2)
    ([0, 0, 0, 1, 2], [2, 3])
    """
    return [max(layer + n_sender - n_receiver, 0) for layer in range(n_receiver)]


def _cleared(kv: KV, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, zero where it does not hold the token: absent slots may hold anything."""
    absent = ~kv.present[layer][:, None, :, None]
    keys, values = kv.layer(layer)
    return keys.masked_fill(absent, 0), values.masked_fill(absent, 0)
