"""Chunks as they came: which blocks are known, and how far."""

import numpy as np

from kvferry.codec.ecsq.grid import Grid
from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.ecsq.part import PartReader
from kvferry.codec.ecsq.scheme import Scheme
from kvferry.codec.entropy.symbols import join as join_numbers
from kvferry.codec.progressive.chunk import join, read_place, read_symbols
from kvferry.codec.progressive.ladder import Known, Ladder
from kvferry.codec.progressive.layered import join_rows, split_grid
from kvferry.codec.progressive.stages import highest_exponent
from kvferry.errors import Malformed


class Reading:
    """Takes chunk after chunk. `blocks`: those that hold tokens, by number, of `n_blocks` that could."""

    def __init__(
        self, blocks: dict[int, Block], n_blocks: int, scheme: Scheme, step: int, n_layers: int
    ) -> None:
        self.known: dict[int, tuple[Ladder, Known]] = {}
        self._blocks, self._n_blocks, self._scheme = blocks, n_blocks, scheme
        self._step, self._n_layers = step, n_layers

    def take(self, body: bytes) -> None:
        """The next chunk; `Malformed` for one that is damaged, comes twice, or refines what did not come."""
        place, offset = read_place(body, self._n_layers, self._n_blocks)
        within = [block for block in place.blocks if block in self._blocks]
        stages = {self.known[block][1].stage if block in self.known else -1 for block in within}
        if stages != {place.stage - 1}:
            what = f"a chunk of stage {place.stage}, its blocks are at {sorted(stages)}"
            raise Malformed(what, cure="Write each stage of a block once, behind the one before")
        (self._refine if place.stage else self._begin)(within, body[offset:])

    def _begin(self, within: list[int], body: bytes) -> None:
        part = Part(tuple(self._blocks[block] for block in within))
        reader = PartReader(body, self._scheme.n_heads(part), int((part.size * (part.counts + 2)).sum()))
        grid = self._scheme.read(part, reader, self._step)
        _check(grid, self._n_layers)
        ladders = [
            Ladder(block, one, self._n_layers)
            for block, one in zip(part.blocks, split_grid(part, grid), strict=True)
        ]
        rows = join_rows(ladders)
        numbers = join_numbers(reader.symbols(rows), rows, reader.raw)
        reader.close()
        ends = np.cumsum([ladder.rows(0).lengths.sum() for ladder in ladders])
        each = np.split(numbers, ends[:-1])
        for block, ladder, found in zip(within, ladders, each, strict=True):
            self.known[block] = ladder, ladder.coarsest(found)

    def _refine(self, within: list[int], body: bytes) -> None:
        each = [ladder.tables(known) for ladder, known in (self.known[block] for block in within)]
        symbols = read_symbols(memoryview(body), join(each))
        ends = np.cumsum([len(tables) for tables in each])
        for block, found in zip(within, np.split(symbols, ends[:-1]), strict=True):
            ladder, known = self.known[block]
            self.known[block] = ladder, ladder.advance(known, found)


def _check(grid: Grid, n_layers: int) -> None:
    highest = highest_exponent(n_layers)
    if grid.exponent.max(initial=0) > highest:
        what = f"an exponent of {grid.exponent.max()} under {n_layers} layers"
        raise Malformed(what, cure=f"It is at most {highest}: use fewer layers or a finer step")
