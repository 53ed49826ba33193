"""A cache of one sequence in layers: all chunks of its message, in the order they are written in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, UInt8

from kvferry.codec.ecsq.grid import Grid
from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.ecsq.message import Message
from kvferry.codec.ecsq.part import code_part
from kvferry.codec.ecsq.side import Side
from kvferry.codec.ecsq.source import Arrays
from kvferry.codec.entropy.symbols import Rows, cost_bits, split
from kvferry.codec.progressive.chunk import Place, join, symbol_bits, write_symbols
from kvferry.codec.progressive.coarse import Coarse
from kvferry.codec.progressive.ladder import Known, Ladder
from kvferry.codec.progressive.order import CHUNK_BYTES, by_gain, places
from kvferry.codec.progressive.stages import highest_exponent, layer_of, n_stages
from kvferry.errors import UsageError
from kvferry.wire import packed_bytes
from kvferry.wire.fields import STEPS_PER_OCTAVE

Symbols = UInt8[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Climb:
    """A block and its numbers at every stage. `place`: its number in the order of blocks."""

    place: int
    ladder: Ladder
    side: Side | None
    known: tuple[Known, ...]
    symbols: tuple[Symbols, ...]
    """Those that lead from each stage to the next."""
    error: Float64[np.ndarray, " stages"]
    """Squared, felt, in finest steps."""

    @cached_property
    def n_bytes(self) -> list[float]:
        """Of each stage."""
        first, rows = self.known[0], self.ladder.rows(0)
        symbols, raw = split(first.numbers, rows)
        side = 0 if self.side is None else len(self.side.code)
        start = (cost_bits(symbols, rows) + float(raw.widths.sum())) / 8 + side
        steps = zip(self.known, self.symbols, strict=False)
        return [start, *(symbol_bits(self.ladder.tables(known), found) / 8 for known, found in steps)]


def climb(message: Message, step: int, n_layers: int, depth: int) -> list[Climb]:
    """All blocks of a measured message at a finest step, in order; the model is `depth` layers deep."""
    found = []
    for measured in message.measured:
        part = measured.part
        if not part.blocks:
            continue
        side, grid = message.scheme.plan(measured, step)
        if grid.exponent.max() > highest_exponent(n_layers):
            what = f"numbers that need a step of 2**{grid.exponent.max() / STEPS_PER_OCTAVE:.4g}"
            raise UsageError(what, cure="Use raw")
        arrays = message.scheme.shaped(Coarse(part, grid, n_layers - 1), message.arrays)
        for index, (block, one) in enumerate(zip(part.blocks, split_grid(part, grid), strict=True)):
            own = None if side is None else _side_of(side, index)
            found.append(_climb(place_of(block, depth), Ladder(block, one, n_layers), own, arrays))
    return sorted(found, key=lambda one: one.place)


def _climb(place: int, ladder: Ladder, side: Side | None, arrays: Arrays) -> Climb:
    target = ladder.deviations(arrays)
    finest = np.rint(target).astype(np.int64)
    known = [ladder.coarsest(ladder.ancestors(finest, ladder.n_layers - 1))]
    symbols = []
    for _ in range(1, n_stages(ladder.n_layers)):
        symbols.append(ladder.wanted(known[-1], finest))
        known.append(ladder.advance(known[-1], symbols[-1]))
    errors = [_error(ladder, one, target) for one in known]
    return Climb(place, ladder, side, tuple(known), tuple(symbols), np.array(errors))


def _error(ladder: Ladder, known: Known, target: np.ndarray) -> float:
    step = np.float32(3 ** layer_of(known.stage, ladder.n_layers))
    return float(np.square(ladder.centres(known) * step - target, dtype=np.float64).sum())


@dataclass(frozen=True, eq=False)
class Layered:
    """The blocks of a message, and how many there could be."""

    climbs: Sequence[Climb]
    n_blocks: int
    n_layers: int

    @cached_property
    def order(self) -> list[Place]:
        """All chunks; a message without tokens has an empty one."""
        if not self.climbs:
            return [Place(0, 0, 0)]
        nothing = [0.0] * n_stages(self.n_layers)
        n_bytes = [self._at[b].n_bytes if b in self._at else nothing for b in range(self.n_blocks)]
        found = [place for place in places(n_bytes) if self._within(place)]

        def gain(place: Place) -> float:
            saved = sum(one.error[place.stage - 1] - one.error[place.stage] for one in self._within(place))
            return saved / (CHUNK_BYTES + sum(n_bytes[block][place.stage] for block in place.blocks))

        return by_gain(found, gain)

    def fits(self, place: Place, lengths: list[int], max_bytes: int) -> bool:
        """Whether a chunk fits a message of segments of these lengths."""
        if not self._within(place) or packed_bytes([*lengths, 0]) > max_bytes:
            return False
        return packed_bytes([*lengths, len(self.body(place))]) <= max_bytes

    def body(self, place: Place) -> bytes:
        """The bytes of a chunk."""
        if place not in self._bodies:
            self._bodies[place] = self._coded(place)
        return self._bodies[place]

    @cached_property
    def _bodies(self) -> dict[Place, bytes]:
        return {}

    @cached_property
    def _at(self) -> dict[int, Climb]:
        return {one.place: one for one in self.climbs}

    def _within(self, place: Place) -> list[Climb]:
        return [self._at[block] for block in place.blocks if block in self._at]

    def _coded(self, place: Place) -> bytes:
        within = self._within(place)
        if not within:
            return b""
        if place.stage == 0:
            return place.write() + _coarsest_body(within)
        before = place.stage - 1
        tables = join([one.ladder.tables(one.known[before]) for one in within])
        return place.write() + write_symbols(tables, join([one.symbols[before] for one in within]))


def _coarsest_body(climbs: Sequence[Climb]) -> bytes:
    rows = join_rows([one.ladder for one in climbs])
    symbols, raw = split(np.concatenate([one.known[0].numbers for one in climbs]), rows)
    return code_part(_joined_side(climbs), rows, symbols, raw).body()


def join_rows(ladders: Sequence[Ladder]) -> Rows:
    """The rows of the coarsest layer of a run of blocks."""
    each = [ladder.rows(0) for ladder in ladders]
    return Rows(
        np.concatenate([rows.level for rows in each]), np.concatenate([rows.lengths for rows in each])
    )


def place_of(block: Block, depth: int) -> int:
    """The number of a block: keys first, layer by layer, then values."""
    return block.which * depth + block.layer


def split_grid(part: Part, grid: Grid) -> list[Grid]:
    """The grid of each block of a part."""
    ends = np.cumsum(part.size).tolist()
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [Grid(grid.exponent[one], grid.step[one], grid.level[one], grid.mean[one]) for one in slices]


def _side_of(side: Side, index: int) -> Side:
    start = int(side.size[:index].sum())
    one = slice(start, start + int(side.size[index]))
    return Side(
        side.code[one], side.mean[one], side.size[index : index + 1], side.n_tokens[index : index + 1]
    )


def _joined_side(climbs: Sequence[Climb]) -> Side | None:
    sides = [one.side for one in climbs if one.side is not None]
    if not sides:
        return None
    names = ("code", "mean", "size", "n_tokens")
    return Side(*(np.concatenate([getattr(side, name) for side in sides]) for name in names))
