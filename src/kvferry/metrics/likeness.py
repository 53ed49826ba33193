"""How alike two caches are to a receiver's own queries, layer by layer and head by head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.kv import KV
from kvferry.metrics.attention import Scores, attention_outputs, cosine, relative_error, visible_slots
from kvferry.rope import rotate


def attention_reads(
    kv: KV,
    queries: Sequence[Float[Tensor, "batch queries new dim"]],
    query_positions: Int[Tensor, "batch new"],
    scores: Sequence[Scores],
) -> tuple[Float[Tensor, "batch queries new value_dim"], ...]:
    """What a receiver's rotated queries read from a cache of its geometry, layer by layer.

    Content keys are rotated to `kv.positions`, which must be the receiver's: set them from the layout for a cache that
    has arrived. Raises `ShapeMismatch`.
    """
    return tuple(
        _layer_reads(kv, index, queries[index], query_positions, scores[index])
        for index in range(kv.geometry.n_layers)
    )


def _layer_reads(
    kv: KV, index: int, queries: Tensor, query_positions: Tensor, scores: Scores
) -> Float[Tensor, "batch queries new value_dim"]:
    layer, (keys, values) = kv.geometry.layers[index], kv.layer(index)
    if kv.space == "content":
        keys = rotate(keys, kv.positions, layer.rotary, kv.call_length)
    visible = visible_slots(layer, kv.present[index], kv.positions[0], query_positions)
    return attention_outputs(queries, keys, values, visible, scores)


@dataclass(frozen=True)
class Likeness:
    """How alike two caches are to the same queries, by layer and query head."""

    cosine: tuple[Float[Tensor, " queries"], ...]
    error: tuple[Float[Tensor, " queries"], ...]

    @property
    def attention_cosine(self) -> float:
        """Mean over layers and heads."""
        return float(torch.cat(self.cosine).mean())

    @property
    def attention_error(self) -> float:
        """Mean over layers and heads of the relative error."""
        return float(torch.cat(self.error).mean())


def likeness(
    got: Sequence[Float[Tensor, "batch queries new value_dim"]],
    want: Sequence[Float[Tensor, "batch queries new value_dim"]],
    mask: Bool[Tensor, "batch new"],
) -> Likeness:
    """Compare what was read, layer by layer, by the queries in `mask`."""
    pairs = list(zip(got, want, strict=True))
    return Likeness(
        tuple(cosine(one, other, mask) for one, other in pairs),
        tuple(relative_error(one, other, mask) for one, other in pairs),
    )


def attention_output_cosine(
    own: KV,
    mapped: KV,
    queries: Sequence[Float[Tensor, "batch queries new dim"]],
    query_positions: Int[Tensor, "batch new"],
    mask: Bool[Tensor, "batch new"],
    scores: Sequence[Scores],
) -> Likeness:
    """Compare a cache that arrived with the receiver's own of the same text, as the receiver's queries see them.

    The two need not have the same number of slots. On a short prefix that the receiver has read itself this is the
    quality gate before a cache is used: it needs nothing of the sender. Raises `ShapeMismatch`.
    """
    with torch.no_grad():
        wanted = attention_reads(own, queries, query_positions, scores)
        got = attention_reads(mapped, queries, query_positions, scores)
    return likeness(got, wanted, mask)
