"""What real queries read from the mapped cache, against what they read from the receiver's own one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import KV
from kvferry.metrics.attention import Scores, visible_slots
from kvferry.metrics.attention_distance import Slots, attention_kl, attention_output_error
from kvferry.rope import rotate
from kvferry.train.losses.base import Aid, Aids, KVLoss, Reads, Terms, missing


@dataclass(frozen=True, repr=False)
class StructuralKVLoss(KVLoss):
    """`alpha_output` of the squared error of what is read, relative to its size and by query head, and `alpha_attn` of
    KL(target's attention || predicted one).

    The queries are the receiver's real ones, never keys in their stead. Queries and keys come in one key space, rotated
    unless the model has no rotation: content keys of several positions say nothing about one another. Every slot that a
    query may not see is masked: causally, by window, as padding. With `alpha_attn=0` the caches may have different
    tokens; the KL compares them slot by slot. Sizes are those of the batch at hand: each piece of it has its own.
    """

    name: ClassVar[str] = "structural"
    alpha_output: float = 1.0
    alpha_attn: float = 0.5

    def __post_init__(self) -> None:
        if min(self.alpha_output, self.alpha_attn) < 0:
            what = f"structural({self.alpha_output}, {self.alpha_attn})"
            raise BadSpec(what, cure="Weights are at least 0")

    @property
    def needs(self) -> frozenset[Aid]:
        return frozenset({"reads"})

    def __call__(
        self,
        queries: Float[Tensor, "batch queries new dim"],
        predicted: Slots,
        target: Slots,
        mask: Bool[Tensor, "batch new"],
        scores: Scores | float,
    ) -> Terms:
        """One layer, over the queries in `mask` that see any of the target; tells `output_error` and, where it counts,
        `attention_kl` in nats.

        Raises `ShapeMismatch` where heads do not divide, or a KL is asked for between different numbers of slots.
        """
        how = scores if isinstance(scores, Scores) else Scores(float(scores))
        queries = queries.detach().masked_fill(~mask[:, None, :, None], 0.0)
        target, mask = target.detached(), mask & target.visible.any(-1)
        with torch.autocast(queries.device.type, enabled=False):
            error = attention_output_error(queries, predicted, target, mask, how).mean()
            loss, told = self.alpha_output * error, {"output_error": error.detach()}
            if self.alpha_attn:
                kl = _mean(attention_kl(queries, predicted, target, how), mask)
                loss, told = loss + self.alpha_attn * kl, {**told, "attention_kl": kl.detach()}
        return loss, told

    def on_cache(self, predicted: KV, target: KV, aids: Aids) -> Terms:
        """Content keys are rotated to `positions`, which must be the receiver's: set them from its layout."""
        reads = aids.reads
        if reads is None:
            raise missing(self, "reads")
        parts = [
            self(queries, _slots(predicted, index, reads), _slots(target, index, reads), reads.mask, scores)
            for index, (queries, scores) in enumerate(zip(reads.queries, reads.scores, strict=True))
        ]
        mean = torch.stack([loss for loss, _ in parts]).mean()
        return mean, {name: torch.stack([told[name] for _, told in parts]).mean() for name in parts[0][1]}


def _slots(kv: KV, index: int, reads: Reads) -> Slots:
    layer, (keys, values) = kv.geometry.layers[index], kv.layer(index)
    if kv.space == "content":
        keys = rotate(keys, kv.positions, layer.rotary, kv.call_length)
    return Slots(keys, values, visible_slots(layer, kv.present[index], kv.positions[0], reads.positions))


def _mean(each: Float[Tensor, "batch queries new"], mask: Bool[Tensor, "batch new"]) -> Float[Tensor, ""]:
    return (each * mask.unsqueeze(1)).sum() / (each.shape[1] * mask.sum()).clamp(min=1)
