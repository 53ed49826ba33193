"""One block on its way from the coarsest layer to the finest: what is known of its numbers after each stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from kvferry.codec.ecsq.grid import SILENT, Grid, centre
from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.ecsq.source import Arrays, BlockArray, Indices, Quantised
from kvferry.codec.entropy.symbols import Rows
from kvferry.codec.progressive.contexts import contexts, outward
from kvferry.codec.progressive.stages import layer_of, level_at, n_stages, parent
from kvferry.errors import UsageError

_LARGEST = 1 << 24
"""Whole numbers stay exact in float32."""

Numbers = Int64[np.ndarray, " _"]
Symbols = UInt8[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Known:
    """The numbers of a block after a stage, in steps of its layer. Where `open`, it is this or the inner one."""

    stage: int
    numbers: Int64[np.ndarray, " n"]
    open: Bool[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Ladder:
    """A block and its grid at the finest step. Numbers are those of the rows that are sent, row after row."""

    block: Block
    grid: Grid
    n_layers: int

    @cached_property
    def quantised(self) -> Quantised:
        return Quantised(Part((self.block,)), self.grid)

    @cached_property
    def sent(self) -> Int64[np.ndarray, " sent"]:
        """The rows that are sent, in order."""
        return np.flatnonzero(self.quantised.level != SILENT)

    def rows(self, stage: int) -> Rows:
        """Levels, at the layer of a stage, and lengths of the rows that are sent."""
        level = level_at(self.quantised.level[self.sent], layer_of(stage, self.n_layers))
        return Rows(level, self.quantised.part.rows.length[self.sent])

    def coarsest(self, numbers: Numbers) -> Known:
        """The first stage."""
        return Known(0, numbers, np.zeros(len(numbers), np.bool_))

    def finest(self, numbers: Numbers) -> Known:
        """The last one."""
        return Known(n_stages(self.n_layers) - 1, numbers, np.zeros(len(numbers), np.bool_))

    def tables(self, known: Known) -> UInt8[np.ndarray, " some"]:
        """The tables of the symbols of the next stage: of all numbers, or of those that are open."""
        rows = self.rows(known.stage + 1)
        level = rows.each(rows.level)
        if known.stage % 2:
            context = contexts().of(level[known.open], np.abs(parent(known.numbers[known.open])))
            return (2 * context + 1).astype(np.uint8)
        return (2 * contexts().of(level, np.abs(known.numbers))).astype(np.uint8)

    def advance(self, known: Known, symbols: Symbols) -> Known:
        """The next stage."""
        if known.stage % 2:
            numbers = known.numbers.copy()
            middle = numbers[known.open]
            numbers[known.open] = middle - outward(middle) * symbols
            return Known(known.stage + 1, numbers, np.zeros_like(known.open))
        numbers = 3 * known.numbers + outward(known.numbers) * symbols
        return Known(known.stage + 1, numbers, symbols == 0)

    def wanted(self, known: Known, finest: Numbers) -> Symbols:
        """The symbols of the next stage that lead to these finest numbers."""
        numbers = self.ancestors(finest, layer_of(known.stage + 1, self.n_layers))
        if known.stage % 2:
            return (numbers[known.open] != known.numbers[known.open]).astype(np.uint8)
        return (numbers == 3 * known.numbers + outward(known.numbers)).astype(np.uint8)

    def ancestors(self, numbers: Numbers, n_up: int) -> Numbers:
        """The cells that numbers lie in, some layers up."""
        for _ in range(n_up):
            numbers = parent(numbers)
        return numbers

    def centres(self, known: Known) -> Float32[np.ndarray, " n"]:
        """Where in its cell each number is decoded to, in steps of the layer."""
        rows = self.rows(known.stage)
        level = rows.each(rows.level)
        found = centre(known.numbers, level)
        cell = parent(known.numbers[known.open])
        found[known.open] = contexts().open_centre(level[known.open], cell)
        return found

    def steps(self, stage: int) -> Float32[np.ndarray, " sent"]:
        """Of each row that is sent."""
        return self.quantised.step[self.sent] * np.float32(3 ** layer_of(stage, self.n_layers))

    def deviations(self, arrays: Arrays) -> Float32[np.ndarray, " n"]:
        """How far the numbers are from their means, in finest steps; `UsageError` where that is too far."""
        quantised, array = self.quantised, by_channel(arrays(self.block))
        inverse = np.float32(1) / quantised.step
        flat = np.concatenate(
            [
                ((array[channels][:, held] - quantised.mean[rows, None]) * inverse[rows, None]).reshape(-1)
                for held, rows, channels in self.groups()
            ]
        )
        largest = float(np.abs(flat).max(initial=0))
        if not largest < _LARGEST:
            cure = "Use a coarser step, or raw"
            raise UsageError(f"a number of {largest:.3g} steps, the limit is {_LARGEST}", cure=cure)
        return flat

    def groups(self) -> Iterator[tuple[Indices, Indices, Indices]]:
        """Per class of tokens: their numbers, the rows that are sent and their channels."""
        sent = self.quantised.level != SILENT
        for _, held, group in self.quantised.part.row_groups():
            channels = np.flatnonzero(sent[group])
            yield held, group.start + channels, channels


def by_channel(array: BlockArray) -> Float32[np.ndarray, "channels tokens"]:
    """The numbers of each channel of a block."""
    return array.transpose(0, 2, 1).reshape(-1, array.shape[1])
