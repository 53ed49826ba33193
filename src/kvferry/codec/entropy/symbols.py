"""Whole numbers of any size as symbols of the frozen tables, and raw bits for what the tables leave out.

A row is a run of numbers of one level: quarter octaves of their deviation, from -12. Up to 12 the level is a table.
Above, each number is divided by a power of two until its table is one of the last four; the low bits, which are as good
as evenly spread, travel raw. A number beyond the reach of its table travels as ESCAPE and an Elias gamma code.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from kvferry.codec.entropy import loops
from kvferry.codec.entropy.rans import Run
from kvferry.codec.entropy.rawbits import BitReader
from kvferry.codec.entropy.tables import COST_UNIT, HIGHEST, LOWEST, tables
from kvferry.codec.fast import available, compiled
from kvferry.errors import Malformed

_LENGTH_BITS = 5
MAX_LEVEL = HIGHEST + 4 * 24
"""Numbers stay below 2**31."""

Numbers = Int64[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Levels and lengths of rows, one after the other."""

    level: Int64[np.ndarray, " rows"]
    lengths: Int64[np.ndarray, " rows"]

    @cached_property
    def shift(self) -> Int64[np.ndarray, " rows"]:
        """Low bits of each number that travel raw."""
        return np.maximum(0, -(HIGHEST - self.level >> 2))

    @cached_property
    def table(self) -> UInt8[np.ndarray, " rows"]:
        return (self.level - 4 * self.shift - LOWEST).astype(np.uint8)

    @cached_property
    def run(self) -> Run:
        return Run(self.table, self.lengths)

    def take(self, index: Int64[np.ndarray, " some"] | Bool[np.ndarray, " rows"]) -> "Rows":
        return Rows(self.level[index], self.lengths[index])

    def each(self, numbers: Int64[np.ndarray, " rows"]) -> Numbers:
        """A number of each row, for each of its numbers."""
        return np.repeat(numbers, self.lengths)


@dataclass(frozen=True)
class Raw:
    """Values and widths in bits of what travels raw."""

    values: Int64[np.ndarray, " raw"]
    widths: Int64[np.ndarray, " raw"]


NO_RAW = Raw(np.zeros(0, np.int64), np.zeros(0, np.int64))


def level_of(
    deviation: Float64[np.ndarray, "*shape"], grain: Int64[np.ndarray, "*shape"] | int = 1
) -> Int64[np.ndarray, "*shape"]:
    """The level of numbers of this deviation, a multiple of `grain`.

    >>> level_of(np.array([0.0, 1.0, 2.0, 1e9])).tolist()
    [-12, 0, 4, 108]
    """
    lowest, highest = 2.0 ** (LOWEST / 4), 2.0 ** (MAX_LEVEL / 4)
    octaves = np.log2(np.clip(deviation, lowest, highest))
    return (grain * np.rint(4 * octaves / grain)).astype(np.int64)


def split(numbers: Numbers, rows: Rows) -> tuple[UInt8[np.ndarray, " n"], Raw]:
    """The symbols of numbers below 2**31, and their raw bits."""
    reach = rows.each(tables().reach[rows.table])
    if not rows.shift.any() and not (np.abs(numbers) > reach).any():
        return (numbers + reach).astype(np.uint8), NO_RAW
    shift = rows.each(rows.shift)
    shifted = numbers + (1 << shift >> 1)
    high = shifted >> shift
    escaped = np.abs(high) > reach
    symbols = np.where(escaped, 2 * reach + 1, high + reach).astype(np.uint8)
    beyond = np.abs(high[escaped]) - reach[escaped]
    lengths = np.frexp(beyond)[1].astype(np.int64) - 1
    signs = (high[escaped] < 0).astype(np.int64)
    low = shift > 0
    values = (lengths, signs, beyond, shifted[low])
    widths = (np.full_like(lengths, _LENGTH_BITS), np.ones_like(lengths), lengths, shift[low])
    return symbols, Raw(np.concatenate(values), np.concatenate(widths))


def join(symbols: UInt8[np.ndarray, " n"], rows: Rows, reader: BitReader) -> Numbers:
    """The inverse of `split`; `Malformed` if the raw bits do not suffice."""
    reach = rows.each(tables().reach[rows.table])
    high = symbols - reach
    escaped = np.flatnonzero(high > reach)
    if not len(escaped) and not rows.shift.any():
        return high
    shift = rows.each(rows.shift)
    lengths = reader.read(np.full(len(escaped), _LENGTH_BITS))
    signs = reader.read(np.ones(len(escaped), np.int64))
    beyond = reader.read(lengths) + (1 << lengths)
    high[escaped] = (1 - 2 * signs) * (beyond + reach[escaped])
    if (np.abs(high[escaped]) >= 1 << 31 - shift[escaped]).any():
        raise Malformed("a number beyond 2**31", cure="Use a coarser step")
    low = np.flatnonzero(shift)
    numbers = (high << shift) - (1 << shift >> 1)
    numbers[low] += reader.read(shift[low])
    return numbers


def cost_bits(symbols: UInt8[np.ndarray, " n"], rows: Rows) -> float:
    """Bits of the symbols in the tables, without what travels raw."""
    if available():
        run = rows.run.merged
        return float(compiled(loops.cost)(symbols, run.table, run.lengths, tables().cost)) / COST_UNIT
    return float(tables().cost[rows.run.tables(), symbols].sum()) / COST_UNIT


def expected_bits(rows: Rows) -> int:
    """What the tables expect for rows of these lengths, without what travels raw."""
    run = rows.run.merged
    return int((tables().entropy[run.table] * run.lengths).sum()) // COST_UNIT
