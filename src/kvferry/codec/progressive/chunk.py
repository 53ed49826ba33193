"""One PAYLOAD segment: a stage of a run of blocks.

    [stage varint][first block varint][blocks varint]  and then
    first stage:  a part of ecsq, on the coarsest layer
    later ones:   [log2 lanes u8][lane states and words]

Blocks are counted keys first, layer by layer, then values; those of layers without tokens are counted and skipped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from kvferry.codec.entropy.rans import MAX_LANE_BITS, Decoder, Run, encode, lane_count
from kvferry.codec.entropy.tables import COST_UNIT
from kvferry.codec.progressive.contexts import contexts
from kvferry.codec.progressive.stages import n_stages
from kvferry.codec.sets import read_number
from kvferry.errors import Malformed
from kvferry.wire.varint import write_varint

Symbols = UInt8[np.ndarray, " _"]


@dataclass(frozen=True, order=True)
class Place:
    """Which stage of which blocks a chunk is."""

    stage: int
    first: int
    count: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.count)

    def starts(self) -> Iterator["Place"]:
        """The chunk itself, and then what is left of it without its last blocks."""
        for count in range(self.count, 0, -1):
            yield Place(self.stage, self.first, count)

    def write(self) -> bytes:
        return b"".join(map(write_varint, (self.stage, self.first, self.count)))


def read_place(body: bytes, n_layers: int, n_blocks: int) -> tuple[Place, int]:
    """What a chunk says it is, and where that ends; `Malformed` for stages and blocks that do not exist."""
    view, numbers, offset = memoryview(body), [], 0
    for _ in range(3):
        number, offset = read_number(view, offset)
        numbers.append(number)
    place = Place(*numbers)
    if place.stage >= n_stages(n_layers) or not 0 < place.count <= n_blocks - place.first:
        what = f"a chunk of stage {place.stage}, blocks {place.first} to {place.first + place.count - 1}"
        raise Malformed(what, cure=f"There are {n_stages(n_layers)} stages of {n_blocks} blocks")
    return place, offset


def write_symbols(tables: Symbols, symbols: Symbols) -> bytes:
    """Symbols of one table after the other, each table's in their order."""
    run, order = _gathered(tables)
    n_lanes = lane_count(int(symbol_bits(tables, symbols)) // 8)
    return bytes([n_lanes.bit_length() - 1]) + encode([(run, symbols[order])], n_lanes)


def read_symbols(body: memoryview, tables: Symbols) -> Symbols:
    """The inverse; `Malformed` for anything else."""
    if not len(body) or body[0] > MAX_LANE_BITS:
        raise Malformed(f"a chunk of {len(body)} bytes is cut", cure="Ask for the frame again")
    decoder = Decoder(body[1:], 1 << body[0])
    run, order = _gathered(tables)
    symbols = np.empty_like(tables)
    symbols[order] = decoder.read(run)
    decoder.close()
    return symbols


def symbol_bits(tables: Symbols, symbols: Symbols) -> float:
    """What the tables say that symbols cost."""
    return float(contexts().book.cost[tables, symbols].sum()) / COST_UNIT


def join(arrays: Sequence[Symbols]) -> Symbols:
    """Those of all blocks of a run."""
    return np.concatenate([np.zeros(0, np.uint8), *arrays])


def _gathered(tables: Symbols) -> tuple[Run, np.ndarray]:
    counts = np.bincount(tables, minlength=1)
    used = np.flatnonzero(counts)
    run = Run(used.astype(np.uint8), counts[used], contexts().book)
    return run, np.argsort(tables, kind="stable")
