"""Mean, deviation and range of every channel of some blocks, the same to the bit however they are added up.

Numbers are first rounded to a grid of 2**-16 of the channel's largest, so that sums are sums of whole numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from kvferry.codec.ecsq import loops
from kvferry.codec.fast import available, compiled

BlockArray = Float32[np.ndarray, "_heads _tokens _dim"]


@dataclass(frozen=True, eq=False)
class Stats:
    """One number a channel, channel = head * dim + place. `low` and `high` are NaN or infinite if a number is."""

    mean: Float64[np.ndarray, " channels"]
    deviation: Float64[np.ndarray, " channels"]
    low: Float32[np.ndarray, " channels"]
    high: Float32[np.ndarray, " channels"]


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of numbers times `scale`, rounded: squares of 2**16 over 2**20 tokens still add up exactly in 53 bits."""

    low: Float32[np.ndarray, " channels"]
    high: Float32[np.ndarray, " channels"]
    scale: Float32[np.ndarray, " channels"]
    total: Float64[np.ndarray, " channels"]
    squares: Float64[np.ndarray, " channels"]


def measure(blocks: Sequence[BlockArray]) -> Stats:
    """The statistics of one block or more, of at least one token each, one after the other."""
    n_tokens = np.repeat([block.shape[1] for block in blocks], [*map(_size, blocks)])
    sums = (_sums_fast if available() else _sums)(blocks)
    mean = sums.total / n_tokens
    variance = np.maximum(sums.squares / n_tokens - mean * mean, 0)
    unit = 1 / sums.scale.astype(np.float64)
    return Stats(mean * unit, np.sqrt(variance) * unit, sums.low, sums.high)


def _size(block: BlockArray) -> int:
    return block.shape[0] * block.shape[2]


def _sums(blocks: Sequence[BlockArray]) -> _Sums:
    each = [_block_sums(block) for block in blocks]
    names = ("low", "high", "scale", "total", "squares")
    return _Sums(*(np.concatenate([getattr(one, name) for one in each]) for name in names))


def _block_sums(block: BlockArray) -> _Sums:
    low, high = block.min(axis=1), block.max(axis=1)
    peak = np.maximum(np.abs(low), np.abs(high))
    exponent = np.frexp(np.where(np.isfinite(peak), peak, 1))[1]
    scale = np.ldexp(np.float32(1), np.minimum(loops.GRID_BITS - exponent, loops.FINEST_GRID)).astype(
        np.float32
    )
    whole = np.rint(block * scale[:, None]).astype(np.float64)
    total, squares = whole.sum(axis=1), (whole * whole).sum(axis=1)
    return _Sums(low.reshape(-1), high.reshape(-1), scale.reshape(-1), total.reshape(-1), squares.reshape(-1))


def _sums_fast(blocks: Sequence[BlockArray]) -> _Sums:
    ends = np.cumsum([0, *map(_size, blocks)]).tolist()
    low, high, scale = np.empty((3, ends[-1]), np.float32)
    total, squares = np.empty((2, ends[-1]))
    measured = compiled(loops.measure)
    for block, start, end in zip(blocks, ends, ends[1:], strict=False):
        one = slice(start, end)
        measured(block, low[one], high[one], scale[one], total[one], squares[one])
    return _Sums(low, high, scale, total, squares)
