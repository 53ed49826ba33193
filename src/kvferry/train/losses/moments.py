"""Where the entries of a model lie and how wide they spread, so that no head and no channel drowns the others.

A key is mostly its head's mean, the same for every token, and heads differ in width by orders of magnitude. Without
these numbers a squared error is that of the few widest channels, and a cosine that of the mean with itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.kv import KV

Whiten = Literal["none", "head", "channel"]
"""Entries as they are; from the mean, over one deviation for a head; from the mean, over one for each channel."""
LEAST_VARIANCE = 1e-4
"""Of a channel, relative to its head: what is a hundred times narrower is noise and must not count as much."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance over tokens, by layer, head and channel, of keys or of values. One layer has no `layers`."""

    mean: Float[Tensor, "*layers heads dim"]
    variance: Float[Tensor, "*layers heads dim"]

    def whiten(
        self, entries: Float[Tensor, "*layers batch heads tokens dim"], how: Whiten
    ) -> Float[Tensor, "*layers batch heads tokens dim"]:
        """Entries in units in which those of the model have mean zero and variance one. Constant heads keep theirs."""
        if how == "none":
            return entries
        head = self.variance.mean(-1, keepdim=True)
        wide = self.variance.maximum(LEAST_VARIANCE * head) if how == "channel" else head
        unit = torch.where(wide > 0, wide, 1.0).sqrt()
        mean, unit = (part.to(entries.dtype).unsqueeze(-2).unsqueeze(-4) for part in (self.mean, unit))
        return (entries - mean) / unit


@dataclass(frozen=True)
class CacheMoments:
    """By group of a `KV`: moments of its keys, moments of its values."""

    groups: tuple[tuple[Moments, Moments], ...]


def moments_of(caches: Iterable[KV]) -> CacheMoments:
    """Moments of a receiver's own caches, on their device, from fp64 sums over the tokens that each layer holds.

    Made once, before the training, of a few hundred texts. Raises `UsageError` without caches, `WrongKeySpace` for
    rotated keys, whose mean depends on where the texts stood.
    """
    total: list[_Sums] | None = None
    for kv in caches:
        kv.require_space("content")
        sums = _sums_of(kv)
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    if total is None:
        raise UsageError("no caches to take moments of", cure="Capture some texts with the receiver")
    found = [sums.moments() for sums in total]
    return CacheMoments(tuple(zip(found[::2], found[1::2], strict=True)))


@dataclass(frozen=True)
class _Sums:
    n: Float64[Tensor, "layers 1 1"]
    x: Float64[Tensor, "layers heads dim"]
    xx: Float64[Tensor, "layers heads dim"]

    @classmethod
    def of(
        cls,
        entries: Float[Tensor, "layers batch heads tokens dim"],
        held: Bool[Tensor, "layers batch tokens"],
    ) -> "_Sums":
        kept = entries.detach().double().masked_fill(~held[:, :, None, :, None], 0.0)
        n = held.sum((1, 2)).double()[:, None, None]
        return cls(n, kept.sum((1, 3)), kept.square().sum((1, 3)))

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.n + other.n, self.x + other.x, self.xx + other.xx)

    def moments(self) -> Moments:
        n = self.n.clamp(min=1)
        mean = self.x / n
        return Moments(mean.float(), (self.xx / n - mean.square()).clamp(min=0).float())


def _sums_of(kv: KV) -> list[_Sums]:
    held = [torch.stack([kv.present[layer] for layer in group.layers]) for group in kv.groups]
    return [
        _Sums.of(part, present)
        for group, present in zip(kv.groups, held, strict=True)
        for part in (group.keys, group.values)
    ]
