"""A cache of one sequence in parts, to be written at any step, or read."""

from dataclasses import dataclass
from functools import cached_property

import torch

from kvferry.codec.ecsq.layout import Part
from kvferry.codec.ecsq.measured import Measured
from kvferry.codec.ecsq.part import NOTHING, Coded, PartReader, code_part
from kvferry.codec.ecsq.scheme import Scheme
from kvferry.codec.ecsq.source import Arrays, Quantised, part_symbols, part_values, write_through
from kvferry.codec.fresh import fresh
from kvferry.kv import Geometry, Group
from kvferry.wire import Segment, SegmentType, packed_bytes


@dataclass(frozen=True, eq=False)
class Message:
    """Measured parts, the scheme of their grids, and what goes before them."""

    head: tuple[Segment, ...]
    measured: list[Measured]
    scheme: Scheme
    arrays: Arrays

    @property
    def n_numbers(self) -> int:
        return sum(int((measured.part.size * measured.part.counts).sum()) for measured in self.measured)

    def at(self, step: int) -> "Written":
        """The message at a step."""
        coded = [self._code(one, step) if one.part.blocks else NOTHING for one in self.measured]
        return Written(step, self.before, coded)

    def through(self, step: int, target: Arrays) -> None:
        """Write what coding at a step does to the numbers."""
        for measured in self.measured:
            if measured.part.blocks:
                _, grid = self.scheme.plan(measured, step)
                quantised = Quantised(measured.part, grid)
                write_through(quantised, self.scheme.shaped(quantised, self.arrays), target)

    @cached_property
    def before(self) -> tuple[Segment, ...]:
        """What goes before the parts."""
        return tuple(sorted((*self.head, *self.scheme.segments()), key=lambda segment: segment.type))

    def _code(self, measured: Measured, step: int) -> Coded:
        side, grid = self.scheme.plan(measured, step)
        quantised = Quantised(measured.part, grid)
        symbols, raw = part_symbols(quantised, self.scheme.shaped(quantised, self.arrays))
        return code_part(side, quantised.rows, symbols, raw)


@dataclass(frozen=True, eq=False)
class Written:
    """A message at a step: what goes before the parts, and the parts, not yet entropy coded."""

    step: int
    before: tuple[Segment, ...]
    coded: list[Coded]

    def segments(self) -> tuple[Segment, ...]:
        """All segments of the message."""
        return (*self.before, *(Segment(SegmentType.PAYLOAD, part.body()) for part in self.coded))

    @cached_property
    def n_bytes(self) -> int:
        """The length of the message, a byte or two off."""
        lengths = [len(segment.body) for segment in self.before]
        return packed_bytes([*lengths, *(part.n_bytes for part in self.coded)])


def read_part(part: Part, body: bytes, scheme: Scheme, step: int, arrays: Arrays) -> None:
    """Write the numbers of a part into `arrays`; `Malformed` for a body that `Message` cannot have written."""
    n_numbers = int((part.size * (part.counts + 2)).sum())
    reader = PartReader(body, scheme.n_heads(part), n_numbers)
    quantised = Quantised(part, scheme.read(part, reader, step))
    part_values(quantised, reader.symbols(quantised.rows), reader.raw, arrays)
    reader.close()


def empty_groups(geometry: Geometry, n_tokens: int, whole: bool) -> tuple[Group, ...]:
    """Room for one sequence, float32, on the CPU; zeros unless the `whole` of it will be filled."""
    found = []
    for layers in geometry.groups():
        shape = geometry.layers[layers[0]]
        sizes = ((len(layers), 1, shape.heads, n_tokens, dim) for dim in (shape.key_dim, shape.value_dim))
        keys, values = (fresh(size, whole, torch.device("cpu")) for size in sizes)
        found.append(Group(layers, keys, values))
    return tuple(found)
