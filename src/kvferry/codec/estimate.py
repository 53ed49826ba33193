"""What a formula says that a cache takes: codes and scales alone, no header, as papers count bytes."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvferry.codec.base import Codec
from kvferry.codec.fixed import FixedRate
from kvferry.codec.scaled import Scaled
from kvferry.kv import KV

_SIDE_BYTES = 2
"""A scale or a mean."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of codes, and of what they are multiplied by or added to."""

    payload: float
    scales: float


@runtime_checkable
class Estimating(Protocol):
    """A codec with a formula of its own."""

    def estimate(self, kv: KV) -> Estimate: ...


def estimate(codec: Codec, kv: KV) -> Estimate | None:
    """The bytes of one sequence by the codec's formula, before a second stage; None where it has no formula."""
    if isinstance(codec, FixedRate):
        return _fixed_rate(codec, kv)
    return codec.estimate(kv) if isinstance(codec, Estimating) else None


def _fixed_rate(codec: FixedRate, kv: KV) -> Estimate:
    payload, scales = 0, 0
    for layer, n in zip(kv.geometry.layers, kv.present[:, 0].sum(1).tolist(), strict=True):
        for dim in (layer.key_dim, layer.value_dim):
            side = (
                _SIDE_BYTES * codec.packing.grouping.n_groups(layer.heads, n, dim)
                if isinstance(codec, Scaled)
                else 0
            )
            payload += codec.block_bytes(layer.heads, n, dim) - side
            scales += side
        if codec.subtracts_means and n:
            scales += _SIDE_BYTES * layer.heads * layer.key_dim
    return Estimate(payload, scales)
