"""One PAYLOAD segment of `ecsq`: side numbers if there is no profile, then all rows, entropy coded.

[log2 lanes u8][raw bytes varint][3 bytes a block, without a profile][lane states and words][raw bits]
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64, UInt8

from kvferry.codec.ecsq.side import HEAD_BYTES, Side, read_heads, read_side, write_side
from kvferry.codec.entropy.rans import MAX_LANE_BITS, Decoder, encode, lane_count
from kvferry.codec.entropy.rawbits import BitReader, write_bits
from kvferry.codec.entropy.symbols import NO_RAW, Raw, Rows, cost_bits, expected_bits, join, split
from kvferry.errors import Malformed
from kvferry.wire.varint import read_varint, write_varint

Symbols = UInt8[np.ndarray, " _"]
_MOST_BYTES = 12
"""What a number can take, a word and its raw bits; a longer part is refused before it is unfolded."""


@dataclass(frozen=True, eq=False)
class Coded:
    """The symbols of a part, before they are entropy coded."""

    head: bytes
    runs: list[tuple[Rows, Symbols]]
    raw: Raw

    @property
    def n_bytes(self) -> int:
        """Length of the body, a byte or two off: rANS is that close to ideal."""
        if not self.runs:
            return 0
        raw = -(-int(self.raw.widths.sum()) // 8)
        coded = sum(cost_bits(symbols, rows) for rows, symbols in self.runs) / 8
        return len(self.head) + 2 + (raw >> 7 > 0) + raw + round(coded) + 3 * self._n_lanes + 1

    def body(self) -> bytes:
        """The bytes of the segment; none if there is nothing to code."""
        if not self.runs:
            return b""
        raw = write_bits(self.raw.values, self.raw.widths)
        start = bytes([self._n_lanes.bit_length() - 1]) + write_varint(len(raw)) + self.head
        return start + encode([(rows.run, symbols) for rows, symbols in self.runs], self._n_lanes) + raw

    @cached_property
    def _n_lanes(self) -> int:
        """For the length that the tables promise, which is known without looking at the symbols."""
        return lane_count(sum(expected_bits(rows) for rows, _ in self.runs) // 8)


def code_part(side: Side | None, rows: Rows, symbols: Symbols, raw: Raw) -> Coded:
    """A part from the symbols of its rows; `side` None where a profile says it all."""
    head, runs, raws = b"", [(rows, symbols)], [raw]
    if side is not None:
        head, numbers, side_rows = write_side(side)
        side_symbols, side_raw = split(numbers, side_rows)
        runs.insert(0, (side_rows, side_symbols))
        raws.insert(0, side_raw)
    values, widths = (np.concatenate([getattr(one, name) for one in raws]) for name in ("values", "widths"))
    return Coded(head, runs, Raw(values, widths))


NOTHING = Coded(b"", [], NO_RAW)


class PartReader:
    """Reads the body of a part: first the side, if there is one, then the rows that it explains."""

    def __init__(self, body: bytes, n_blocks_with_side: int, n_numbers: int) -> None:
        view = memoryview(body)
        found = read_varint(view, 1)
        start = (found[1] if found else 0) + HEAD_BYTES * n_blocks_with_side
        if found is None or body[0] > MAX_LANE_BITS or start + found[0] > len(body):
            raise Malformed(f"a part of {len(body)} bytes is cut", cure="Ask for the frame again")
        most = start + (4 << body[0]) + _MOST_BYTES * n_numbers
        if len(body) > most:
            what = f"a part of {len(body)} bytes for {n_numbers} numbers"
            raise Malformed(what, cure=f"It takes at most {most}")
        self._heads = body[found[1] : start]
        self._decoder = Decoder(view[start : len(body) - found[0]], 1 << body[0])
        self.raw = BitReader(view[len(body) - found[0] :])

    def side(self, size: Int64[np.ndarray, " blocks"], n_tokens: Int64[np.ndarray, " blocks"]) -> Side:
        base, rows = read_heads(self._heads, size)
        numbers = join(self._decoder.read(rows.run), rows, self.raw)
        return read_side(base, numbers, size, n_tokens)

    def symbols(self, rows: Rows) -> Symbols:
        return self._decoder.read(rows.run)

    def close(self) -> None:
        """Raise `Malformed` if anything is left."""
        self._decoder.close()
        self.raw.close()
