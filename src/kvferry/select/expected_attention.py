"""Slots by the attention that future queries are expected to give them."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Need
from kvferry.metrics.attention import attention_logits, softmax_seen, visible_slots
from kvferry.rope import RotarySpec, rotate
from kvferry.select.attention import on_slots, recorded, scores_of_layer
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class ExpectedAttention(TokenSelector):
    """Keeps the slots of most expected attention times length of the value (Devoto et al., arXiv:2510.00636).

    The queries of the next `n_future` positions are taken to be Gaussian, with the mean and covariance of the content
    queries seen so far (the first `sinks` left out: they are outliers), turned by the mean rotation of those positions.
    A soft cap bounds the mean only. A token that a layer's window soon leaves behind counts for as long as it is seen.

    >>> ExpectedAttention(n_future=64).brief()
    'expected_attention(n_future=64)'
    """

    name: ClassVar[str] = "expected_attention"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    n_future: int = 512
    sinks: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_future < 1:
            raise BadSpec(f"expected_attention(n_future={self.n_future})", cure="n_future is 1 or more")

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        read = sight.read
        ahead = torch.arange(1, self.n_future + 1, device=read.device)
        future = (read.positions.max() + ahead).view(1, 1, -1)
        kinds = {(one.rotary, one.key_dim) for one in read.geometry.layers}
        turns = {kind: mean_rotation(*kind, future, read.call_length) for kind in kinds}

        def of_layer(layer: int) -> Float[Tensor, " tokens"]:
            geometry = read.geometry.layers[layer]
            turn = turns[geometry.rotary, geometry.key_dim]
            values = read.layer(layer)[1][0]
            expected = self._expected(sight, layer, turn, future)
            return (expected * values.float().norm(dim=-1)).mean(0)

        return on_slots(sight, of_layer)

    def _expected(
        self, sight: Sight, layer: int, turn: Float[Tensor, "dim dim"], future: Int[Tensor, "1 1 new"]
    ) -> Float[Tensor, "heads tokens"]:
        """Softmax of the log of E exp(q·k), mean over the query heads of each key head."""
        queries = recorded(sight.evidence.queries_content, "queries_content")[layer][0].float()
        read, geometry, how = sight.read, sight.read.geometry.layers[layer], scores_of_layer(sight, layer)
        mean, covariance = moments(queries[:, min(self.sinks, queries.shape[1] - 1) :])
        keys = rotate(read.layer(layer)[0], read.positions, geometry.rotary, read.call_length)
        logits = attention_logits((mean @ turn)[None, :, None], keys, how)
        logits = logits + how.scale**2 / 2 * _spread(keys[0], turn.mT @ covariance @ turn)[None, :, None]
        seen = visible_slots(geometry, read.present[layer], read.positions[0], future[0])
        weights = softmax_seen(logits, seen.any(1, keepdim=True), how.sinks)[0, :, 0]
        return (weights * seen[0].float().mean(0)).unflatten(0, (geometry.heads, -1)).mean(1)


def moments(
    queries: Float[Tensor, "queries tokens dim"],
) -> tuple[Float[Tensor, "queries dim"], Float[Tensor, "queries dim dim"]]:
    """Mean and covariance of the queries of each head."""
    mean = queries.mean(1)
    centred = queries - mean.unsqueeze(1)
    return mean, centred.mT @ centred / queries.shape[1]


def mean_rotation(
    rotary: RotarySpec, dim: int, positions: Int[Tensor, "1 1 new"], call_length: int
) -> Float[Tensor, "dim dim"]:
    """The mean over `positions` of what rotation does to a row of `dim` channels, as a matrix on its right."""
    units = torch.eye(dim, device=positions.device)[None, :, None].expand(-1, -1, positions.shape[-1], -1)
    return rotate(units, positions, rotary, call_length)[0].mean(1)


def _spread(
    keys: Float[Tensor, "heads tokens dim"], covariance: Float[Tensor, "queries dim dim"]
) -> Float[Tensor, "queries tokens"]:
    """k' C k of each query head's covariance with the keys that it reads."""
    shared = covariance.unflatten(0, (keys.shape[0], -1))
    return torch.einsum("htd,hgde,hte->hgt", keys, shared, keys).flatten(0, 1)
