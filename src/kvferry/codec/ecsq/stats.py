"""Mean, deviation and range of every channel of a block, the same to the bit however they are added up.

Numbers are first rounded to a grid of 2**-16 of the channel's largest, so that sums are sums of whole numbers.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from kvferry.codec.ecsq import loops
from kvferry.codec.fast import available, compiled

_GRID_BITS = 16
"""Squares of 2**16 over 2**20 tokens still add up exactly in 64 bits."""


@dataclass(frozen=True)
class Stats:
    """One number a channel, channel = head * dim + place. `low` and `high` are NaN or infinite if a number is."""

    mean: Float64[np.ndarray, " channels"]
    deviation: Float64[np.ndarray, " channels"]
    low: Float32[np.ndarray, " channels"]
    high: Float32[np.ndarray, " channels"]

    power: float
    """What a step is measured by: mean square about the channel means, each mean counted as one more token."""


def measure(block: Float32[np.ndarray, "heads tokens dim"]) -> Stats:
    """The statistics of at least one token."""
    n_tokens = block.shape[1]
    low, high = (extreme.reshape(-1) for extreme in _range(block))
    peak = np.maximum(np.abs(low), np.abs(high))
    exponent = np.frexp(np.where(np.isfinite(peak), peak, 1))[1]
    scale = np.ldexp(np.float32(1), np.minimum(_GRID_BITS - exponent, 126)).astype(np.float32)
    total, squares = (_sums_fast if available() else _sums)(block, scale.reshape(block.shape[0], -1))
    mean = total.reshape(-1) / n_tokens
    variance = np.maximum(squares.reshape(-1) / n_tokens - mean * mean, 0)
    unit = 1 / scale.astype(np.float64)
    mean, variance = mean * unit, variance * unit * unit
    power = float(((n_tokens * variance + mean * mean) / (n_tokens + 1)).mean())
    return Stats(mean, np.sqrt(variance), low, high, power)


def _range(
    block: Float32[np.ndarray, "heads tokens dim"],
) -> tuple[Float32[np.ndarray, "heads dim"], Float32[np.ndarray, "heads dim"]]:
    if not available():
        return block.min(axis=1), block.max(axis=1)
    low, high = block[:, 0].copy(), block[:, 0].copy()
    compiled(loops.extremes)(block, low, high)
    return low, high


def _sums(
    block: Float32[np.ndarray, "heads tokens dim"], scale: Float32[np.ndarray, "heads dim"]
) -> tuple[Float64[np.ndarray, "heads dim"], Float64[np.ndarray, "heads dim"]]:
    whole = np.rint(block * scale[:, None]).astype(np.float64)
    return whole.sum(axis=1), (whole * whole).sum(axis=1)


def _sums_fast(
    block: Float32[np.ndarray, "heads tokens dim"], scale: Float32[np.ndarray, "heads dim"]
) -> tuple[Float64[np.ndarray, "heads dim"], Float64[np.ndarray, "heads dim"]]:
    total, squares = np.zeros(scale.shape), np.zeros(scale.shape)
    compiled(loops.sums)(block, scale, total, squares)
    return total, squares
