"""Levels and means of the channels, for messages that need no profile: a few bits a channel, coded like the rest.

A block sends three bytes: a base level, and the levels of the two rows of whole numbers that follow, entropy coded:
for each channel its level less the base, then its mean in units that the level gives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from kvferry.codec.ecsq.grid import SILENT, Grid, grain_of, mean_unit, step_size
from kvferry.codec.entropy.symbols import MAX_LEVEL, Rows, level_of
from kvferry.codec.entropy.tables import LOWEST
from kvferry.errors import Malformed

HEAD_BYTES = 3

Numbers = Int64[np.ndarray, " n"]
Blocks = Int64[np.ndarray, " blocks"]


@dataclass(frozen=True, eq=False)
class Side:
    """What is sent of each channel: `code` for its level, `mean` in units. `size` and `n_tokens` are of the blocks."""

    code: Int64[np.ndarray, " channels"]
    mean: Int64[np.ndarray, " channels"]
    size: Int64[np.ndarray, " blocks"]
    n_tokens: Int64[np.ndarray, " blocks"]


def code_levels(level: Numbers, n_tokens: Numbers) -> Numbers:
    """0 for a silent channel, else its level in grains, counted from 1."""
    return np.where(level == SILENT, 0, ((level - LOWEST) >> grain_of(n_tokens) - 1) + 1)


def write_side(side: Side) -> tuple[bytes, Numbers, Rows]:
    """The heads of the blocks, and the numbers and rows to be coded."""
    starts = np.cumsum(side.size) - side.size
    base = _medians(side.code, starts, side.size)
    rest = side.code - np.repeat(base, side.size)
    levels = np.stack([_row_level(rest, starts, side.size), _row_level(side.mean, starts, side.size)], 1)
    heads = np.concatenate([base[:, None], levels - LOWEST], axis=1).astype(np.uint8)
    return heads.tobytes(), _braid(rest, side.mean, side.size), _rows(levels, side.size)


def read_heads(data: bytes, size: Blocks) -> tuple[Blocks, Rows]:
    """The base codes of blocks and the rows that follow; `Malformed` for levels that do not exist."""
    heads = np.frombuffer(data, np.uint8).reshape(-1, HEAD_BYTES).astype(np.int64)
    levels = heads[:, 1:] + LOWEST
    if len(heads) != len(size) or (levels > MAX_LEVEL).any():
        raise Malformed(f"{len(data)} bytes for {len(size)} blocks", cure="Write them with kvferry.codec")
    return heads[:, 0], _rows(levels, size)


def read_side(base: Blocks, numbers: Numbers, size: Blocks, n_tokens: Blocks) -> Side:
    """The inverse of `write_side`; `Malformed` for a level that does not exist."""
    rest, mean = _unbraid(numbers, size)
    code = rest + np.repeat(base, size)
    highest = (MAX_LEVEL - LOWEST) // grain_of(n_tokens) + 1
    if ((code < 0) | (code > np.repeat(highest, size))).any():
        raise Malformed("the level of a channel does not exist", cure="Write it with kvferry.codec")
    return Side(code, mean, size, n_tokens)


def grid_of(side: Side, exponent: Numbers) -> Grid:
    """The grid that both ends use: that of what is sent, not of what was measured."""
    n_tokens = np.repeat(side.n_tokens, side.size)
    level = np.where(side.code == 0, SILENT, LOWEST + (side.code - 1) * grain_of(n_tokens))
    step = step_size(exponent)
    return Grid(exponent, step, level, scaled_mean(side.mean, mean_unit(level, step, n_tokens)))


def scaled_mean(mean: Numbers, unit: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Means from their units: multiplied in double precision, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):  # a grid refuses infinite means
        return (mean * unit.astype(np.float64)).astype(np.float32)


def _row_level(numbers: Numbers, starts: Blocks, size: Blocks) -> Blocks:
    return level_of(np.sqrt(np.add.reduceat(numbers.astype(np.float64) ** 2, starts) / size))


def _rows(levels: Int64[np.ndarray, "blocks two"], size: Blocks) -> Rows:
    return Rows(levels.reshape(-1), np.repeat(size, 2))


def _medians(numbers: Numbers, starts: Blocks, size: Blocks) -> Blocks:
    """The median of each block, rounded down; all numbers are below 2**16, and none negative."""
    ordered = np.sort(numbers + (np.repeat(np.arange(len(size)), size) << 16)) & 0xFFFF
    return (ordered[starts + (size - 1) // 2] + ordered[starts + size // 2]) // 2


def _braid(first: Numbers, second: Numbers, size: Blocks) -> Int64[np.ndarray, " both"]:
    """For each block its stretch of `first`, then that of `second`."""
    ends = np.cumsum(size).tolist()
    stretches = (slice(start, end) for start, end in zip([0, *ends], ends, strict=False))
    return np.concatenate([numbers[one] for one in stretches for numbers in (first, second)])


def _unbraid(numbers: Int64[np.ndarray, " both"], size: Blocks) -> tuple[Numbers, Numbers]:
    """The inverse."""
    ends = np.cumsum(np.repeat(size, 2)).tolist()
    stretches = [numbers[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return np.concatenate(stretches[::2]), np.concatenate(stretches[1::2])
