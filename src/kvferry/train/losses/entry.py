"""Losses that compare a cache number by number: each key with its key, each value with its value.

A subclass says how two vectors compare; whitening, masks and the mean over heads and tokens are done here, for one
layer or for all layers of a shape at once.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import ShapeMismatch
from kvferry.kv import KV, Group
from kvferry.train.losses.base import Aid, Aids, KVLoss, Terms, missing
from kvferry.train.losses.moments import Moments, Whiten

Vectors = Float[Tensor, "*vectors dim"]
PerVector = Float[Tensor, "*vectors"]


@dataclass(frozen=True, repr=False)
class EntryLoss(KVLoss):
    """Compares vectors of one head, in the coordinates that `whiten` names."""

    whiten: Whiten = field(default="none", kw_only=True)

    @property
    def needs(self) -> frozenset[Aid]:
        return frozenset() if self.whiten == "none" else frozenset({"moments"})

    @abstractmethod
    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        """The loss of each vector, and what it tells beside."""

    def __call__(
        self,
        predicted: Float[Tensor, "*layers batch heads tokens dim"],
        target: Float[Tensor, "*layers batch heads tokens dim"],
        mask: Bool[Tensor, "*layers batch tokens"],
        moments: Moments | None = None,
    ) -> Terms:
        """By layer, the mean over heads and over the tokens in `mask`; zero for a layer without any.

        Raises `UsageError` where whitening was asked for and moments are missing.
        """
        got, want = (self._ready(part, mask, moments) for part in (predicted, target.detach()))
        loss, metrics = self.compare(got, want)
        return _mean(loss, mask), {name: _mean(one.detach(), mask) for name, one in metrics.items()}

    def _ready(
        self,
        entries: Float[Tensor, "*layers batch heads tokens dim"],
        mask: Bool[Tensor, "*layers batch tokens"],
        moments: Moments | None,
    ) -> Float[Tensor, "*layers batch heads tokens dim"]:
        entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
        if self.whiten != "none":
            if moments is None:
                raise missing(self, "moments")
            entries = moments.whiten(entries, self.whiten)
        # Zeros, not a weight of zero afterwards: zero times NaN is NaN, in the gradient too.
        return entries.masked_fill(~mask[..., None, :, None], 0.0)

    def on_cache(self, predicted: KV, target: KV, aids: Aids) -> Terms:
        _require_same_slots(predicted, target)
        parts, weights = [], []
        for number, (got, want) in enumerate(zip(predicted.groups, target.groups, strict=True)):
            mask = _held(predicted, got) & _held(target, want)
            keys, values = (None, None) if aids.moments is None else aids.moments.groups[number]
            parts += [self(got.keys, want.keys, mask, keys), self(got.values, want.values, mask, values)]
            weights += [mask.flatten(1).any(-1)] * 2
        return _over_layers(parts, torch.cat(weights))


def _mean(
    each: Float[Tensor, "*layers batch heads tokens"], mask: Bool[Tensor, "*layers batch tokens"]
) -> Float[Tensor, "*layers"]:
    total = (each * mask.unsqueeze(-2)).sum((-3, -2, -1))
    return total / (each.shape[-2] * mask.sum((-2, -1))).clamp(min=1)


def _over_layers(parts: list[Terms], held: Bool[Tensor, " all_layers"]) -> Terms:
    """Mean over layers that hold tokens, of keys and values alike."""
    share = held / held.sum().clamp(min=1)

    def mean(rows: list[Float[Tensor, "_"]]) -> Float[Tensor, ""]:
        return (torch.cat(rows) * share).sum()

    names = parts[0][1]
    return mean([loss for loss, _ in parts]), {
        name: mean([told[name] for _, told in parts]) for name in names
    }


def _held(kv: KV, group: Group) -> Bool[Tensor, "layers batch tokens"]:
    return torch.stack([kv.present[layer] for layer in group.layers])


def _require_same_slots(predicted: KV, target: KV) -> None:
    """Keys are compared without rotation: rotated ones agree or differ by where they stand."""
    for kv in (predicted, target):
        kv.require_space("content")
    if predicted.present.shape != target.present.shape:
        got, want = (tuple(kv.present.shape[1:]) for kv in (predicted, target))
        cure = "Bring both to one token grid, or compare what queries read: structural(alpha_attn=0.0)"
        raise ShapeMismatch(f"{got} slots against {want}", cure=cure)
    if [group.layers for group in predicted.groups] != [group.layers for group in target.groups]:
        raise ShapeMismatch("groups of different layers", cure="Stack layers as Geometry.groups() does")
