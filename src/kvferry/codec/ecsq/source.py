"""The rows of one part on its grid: symbols out of a cache, numbers into a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from kvferry.codec.ecsq import loops
from kvferry.codec.ecsq.grid import CLASS_EXPONENT, SILENT, Grid, centre, class_level, step_size, whole
from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.entropy.rawbits import BitReader
from kvferry.codec.entropy.symbols import NO_RAW, Raw, Rows, join, split
from kvferry.codec.entropy.tables import LOWEST, N_TABLES, tables
from kvferry.codec.fast import available, compiled
from kvferry.errors import UsageError

_LARGEST = 1 << 24
"""Whole numbers stay exact in float32."""

BlockArray = Float32[np.ndarray, "heads tokens dim"]
Symbols = UInt8[np.ndarray, " n"]
Indices = Int64[np.ndarray, " some"]


Arrays = Callable[[Block], BlockArray]
"""Hands out the array of a block: all tokens of the message, those that its layer does not hold too."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """The rows of a part on a grid, and the order in which they are coded."""

    part: Part
    grid: Grid

    @cached_property
    def level(self) -> Int64[np.ndarray, " rows"]:
        """Of each row; `SILENT` for those of a silent channel, which are not sent."""
        if self.part.alike:
            return self.grid.level
        rows, level = self.part.rows, self.grid.level[self.part.rows.channel]
        return np.where(level == SILENT, SILENT, class_level(level, rows.token_class))

    @cached_property
    def exponent(self) -> Int64[np.ndarray, " rows"]:
        if self.part.alike:
            return self.grid.exponent
        rows = self.part.rows
        return self.grid.exponent[rows.channel] + CLASS_EXPONENT * (rows.token_class - 1)

    @cached_property
    def step(self) -> Float32[np.ndarray, " rows"]:
        return self.grid.step if self.part.alike else step_size(self.exponent)

    @cached_property
    def mean(self) -> Float32[np.ndarray, " rows"]:
        return self.grid.mean if self.part.alike else self.grid.mean[self.part.rows.channel]

    @cached_property
    def sent(self) -> Int64[np.ndarray, " sent"]:
        """The rows that are sent, by table, so that a decoder stays with one table as long as it can."""
        index = np.flatnonzero(self.level != SILENT)
        return index[np.argsort(Rows(self.level[index], index).table, kind="stable")]

    @cached_property
    def rows(self) -> Rows:
        """Levels and lengths of the rows that are sent."""
        return Rows(self.level[self.sent], self.part.rows.length[self.sent])

    def places(self, sent: Indices) -> Int64[np.ndarray, " rows"]:
        """Where each row starts among the numbers of some rows; -1 for the others."""
        lengths = self.part.rows.length[sent]
        place = np.full(len(self.level), -1, np.int64)
        place[sent] = np.cumsum(lengths) - lengths
        return place


def part_symbols(quantised: Quantised, arrays: Arrays) -> tuple[Symbols, Raw]:
    """The symbols of the rows that are sent, and their raw bits."""
    rows = quantised.rows
    symbols = np.empty(int(rows.lengths.sum()), np.uint8)
    slow = _fast_symbols(quantised, arrays, symbols) if available() else np.ones(len(rows.level), np.bool_)
    if not slow.any():
        return symbols, NO_RAW
    found, raw = split(_numbers(quantised, arrays, quantised.sent[slow]), rows.take(slow))
    symbols[_members(rows, slow)] = found
    return symbols, raw


def part_values(quantised: Quantised, symbols: Symbols, reader: BitReader, arrays: Arrays) -> None:
    """Write the numbers of a part into the arrays of its blocks, and the means of silent channels."""
    rows, slow = quantised.rows, np.ones(len(quantised.sent), np.bool_)
    if available():
        slow = _fast_values(quantised, symbols, arrays)
    else:
        silent = np.flatnonzero(quantised.level == SILENT)
        _write(quantised, silent, np.zeros(int(quantised.part.rows.length[silent].sum()), np.int64), arrays)
    if slow.any():
        numbers = join(symbols[_members(rows, slow)], rows.take(slow), reader)
        _write(quantised, quantised.sent[slow], numbers, arrays)


def write_through(quantised: Quantised, source: Arrays, target: Arrays) -> None:
    """What coding does to the numbers of a part."""
    every = np.arange(len(quantised.level))
    _write(quantised, every, _numbers(quantised, source, every), target)


def _members(rows: Rows, chosen: Bool[np.ndarray, " sent"]) -> Int64[np.ndarray, " n"]:
    """Where the numbers of some rows lie among those of all."""
    return np.flatnonzero(np.repeat(chosen, rows.lengths))


def _fast_symbols(quantised: Quantised, arrays: Arrays, symbols: Symbols) -> Bool[np.ndarray, " sent"]:
    """Write the symbols of rows without raw bits; returns which of the rows that are sent have some."""
    table = quantised.level - LOWEST
    slow = table >= N_TABLES
    place = np.where(slow, -1, quantised.places(quantised.sent))
    inverse = np.float32(1) / quantised.step
    reach = tables().reach.astype(np.float32).take(table, mode="clip")
    mean, kernel = quantised.mean, compiled(loops.symbols)
    for block, held, rows in quantised.part.row_groups():
        kernel(arrays(block), held, mean[rows], inverse[rows], reach[rows], place[rows], symbols, slow[rows])
    return slow[quantised.sent]


def _fast_values(quantised: Quantised, symbols: Symbols, arrays: Arrays) -> Bool[np.ndarray, " sent"]:
    """Write the numbers of rows without raw bits; returns which of the rows that are sent have some."""
    slow = quantised.level - LOWEST >= N_TABLES
    table = np.minimum(np.maximum(quantised.level - LOWEST, 0), N_TABLES - 1)
    place, step, mean = quantised.places(quantised.sent), quantised.step, quantised.mean
    reach, centres = tables().reach.astype(np.float32)[table], tables().centroid[:, 1:]
    # One array each, numbers side by side, or the loops are not compiled to work on many at once.
    first, second, third = (np.ascontiguousarray(centres[:, i])[table] for i in range(3))
    each = (place, reach, first, second, third, step, mean, slow)
    for block, held, rows in quantised.part.row_groups():
        compiled(loops.values)(arrays(block), held, symbols, *(numbers[rows] for numbers in each))
    return slow[quantised.sent]


def _numbers(quantised: Quantised, arrays: Arrays, sent: Indices) -> Int64[np.ndarray, " n"]:
    """The whole numbers of some rows, one row after the other; 0 in silent ones."""
    place = quantised.places(sent)
    out = np.zeros(int(quantised.part.rows.length[sent].sum()), np.int64)
    for block, held, group in quantised.part.row_groups():
        some = np.flatnonzero(place[group] >= 0)
        if len(some):
            rows = group.start + some
            numbers = arrays(block).transpose(0, 2, 1).reshape(block.n_channels, -1)[some][:, held]
            found = _checked(whole(numbers, quantised.mean[rows], quantised.step[rows]))
            out[place[rows][:, None] + np.arange(len(held))] = found
    return out


def _checked(numbers: Float32[np.ndarray, "rows tokens"]) -> Float32[np.ndarray, "rows tokens"]:
    largest = float(np.abs(numbers).max(initial=0))
    if not largest < _LARGEST:
        cure = "Use a coarser step, or raw"
        raise UsageError(f"a number of {largest:.3g} steps, the limit is {_LARGEST}", cure=cure)
    return numbers


def _write(quantised: Quantised, sent: Indices, numbers: Int64[np.ndarray, " n"], arrays: Arrays) -> None:
    """Write the numbers of some rows to their places."""
    place = quantised.places(sent)
    for block, held, group in quantised.part.row_groups():
        some = np.flatnonzero(place[group] >= 0)
        if len(some):
            rows = group.start + some
            found = numbers[place[rows][:, None] + np.arange(len(held))]
            level = np.broadcast_to(quantised.level[rows][:, None], found.shape)
            step, mean = quantised.step[rows][:, None], quantised.mean[rows][:, None]
            head, dim = np.divmod(some, block.dim)
            arrays(block)[head[:, None], held[None], dim[:, None]] = centre(found, level) * step + mean
