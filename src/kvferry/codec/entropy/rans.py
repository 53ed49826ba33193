"""Static rANS (Duda, arXiv:1311.2540), several lanes interleaved into one stream of 16-bit words.

Rule 1: symbol i of a call belongs to lane i modulo lanes; a lane is a state of 32 bits, at rest 2**16.
Rule 2: the decoder takes a word for each lane that falls below 2**16, in order of symbols. The encoder runs backwards,
so states are written first, then the words.
Rule 3: a stream that does not end at rest, with every word used, is refused.

This file is the reference, one numpy step for each row of lanes; `loops.py` does the same in compiled loops.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt8, UInt16

from kvferry.codec.entropy import loops
from kvferry.codec.entropy.tables import PRECISION_BITS, TOTAL, Book, tables
from kvferry.codec.fast import available, compiled
from kvferry.errors import Malformed

_REST = 1 << 16
_MASK = np.uint64(TOTAL - 1)
MAX_LANE_BITS = 8


@dataclass(frozen=True, eq=False)
class Run:
    """Symbols of one table each: row r is `lengths[r]` symbols of table `table[r]`, one row after the other."""

    table: UInt8[np.ndarray, " rows"]
    lengths: Int[np.ndarray, " rows"]
    book: Book = field(default_factory=tables)
    """Where the tables stand."""

    @property
    def n_symbols(self) -> int:
        return int(self.lengths.sum())

    def tables(self) -> UInt8[np.ndarray, " symbols"]:
        """The table of each symbol."""
        return np.repeat(self.table, self.lengths)

    @cached_property
    def merged(self) -> "Run":
        """The same symbols in as few rows as can be."""
        if not len(self.table):
            return self
        first = np.flatnonzero(np.diff(self.table, prepend=self.table[0] + np.uint8(1)))
        return Run(self.table[first], np.add.reduceat(self.lengths, first), self.book)


def encode(runs: list[tuple[Run, UInt8[np.ndarray, " _"]]], n_lanes: int) -> bytes:
    """The stream of several runs with their symbols, to be decoded in the same order.

    >>> run = Run(np.array([12], np.uint8), np.array([3]))
    >>> data = encode([(run, np.array([5, 6, 8], np.uint8))], 1)
    >>> decoder = Decoder(data, 1)
    >>> decoder.read(run).tolist()
    [5, 6, 8]
    >>> decoder.close()
    """
    states = np.full(n_lanes, _REST, np.uint64)
    words: list[UInt16[np.ndarray, " _"]] = []
    step = _encode_fast if available() else _encode_plain
    for run, symbols in reversed(runs):
        words.append(step(run, symbols, states))
    return states.astype("<u4").tobytes() + np.concatenate([*reversed(words)]).astype("<u2").tobytes()


def _encode_plain(
    run: Run, symbols: UInt8[np.ndarray, " symbols"], states: np.ndarray
) -> UInt16[np.ndarray, " words"]:
    """Words of one run, in order of reading; `states` are moved on."""
    table, which = run.book, run.tables()
    n_lanes, n = len(states), len(symbols)
    rows = -(-n // n_lanes)
    # A frequency of 2**14 from 0 moves nothing: it fills the last row.
    frequency = np.full(rows * n_lanes, TOTAL, np.uint64)
    start = np.zeros(rows * n_lanes, np.uint64)
    frequency[:n], start[:n] = table.frequency[which, symbols], table.start[which, symbols]
    frequency, start = frequency.reshape(rows, n_lanes), start.reshape(rows, n_lanes)
    limit = frequency << np.uint64(32 - PRECISION_BITS)
    words = []
    for row in range(rows - 1, -1, -1):
        full = states >= limit[row]
        words.append((states[full] & np.uint64(0xFFFF)).astype(np.uint16))
        states[full] >>= np.uint64(16)
        quotient, rest = np.divmod(states, frequency[row])
        states[:] = (quotient << np.uint64(PRECISION_BITS)) + rest + start[row]
    return np.concatenate([np.zeros(0, np.uint16), *reversed(words)])


def _encode_fast(
    run: Run, symbols: UInt8[np.ndarray, " symbols"], states: np.ndarray
) -> UInt16[np.ndarray, " words"]:
    table, rows = run.book, run.merged
    words = np.empty(len(symbols) + 1, np.uint16)
    used = compiled(loops.encode)(
        symbols, rows.table, rows.lengths, table.frequency, table.start, table.inverse, states, words
    )
    return words[len(words) - int(used) :]


class Decoder:
    """Reads a stream, run after run."""

    def __init__(self, data: bytes | memoryview, n_lanes: int) -> None:
        if len(data) < 4 * n_lanes or len(data) % 2:
            what = f"an entropy-coded part of {len(data)} bytes for {n_lanes} lanes"
            raise Malformed(what, cure="Write 4 bytes a lane and then words of 2")
        self._states = np.frombuffer(data[: 4 * n_lanes], "<u4").astype(np.uint64)
        self._n_words = len(data) // 2 - 2 * n_lanes
        # The compiled loop looks one row of lanes ahead.
        self._words = np.zeros(self._n_words + n_lanes, np.uint16)
        self._words[: self._n_words] = np.frombuffer(data[4 * n_lanes :], "<u2")
        self._used = 0

    def read(self, run: Run) -> UInt8[np.ndarray, " symbols"]:
        """The symbols of the next run; `Malformed` if the stream ends before."""
        out = (self._read_fast if available() else self._read_plain)(run)
        if self._used > self._n_words:
            what = f"an entropy-coded part ends after {self._n_words} words"
            raise Malformed(what, cure="Ask for the frame again")
        return out

    def close(self) -> None:
        """Raise `Malformed` unless all was read and every lane is at rest."""
        if self._used != self._n_words or bool((self._states != _REST).any()):
            what = f"an entropy-coded part of {self._n_words} words ends after {self._used}, or not at rest"
            raise Malformed(what, cure="Write it with kvferry.codec")

    def _read_plain(self, run: Run) -> UInt8[np.ndarray, " symbols"]:
        table, n_lanes = run.book, len(self._states)
        rows = -(-run.n_symbols // n_lanes)
        which = np.resize(run.tables(), (rows, n_lanes))
        out = np.empty((rows, n_lanes), np.uint8)
        for row in range(rows):
            in_use = min(n_lanes, run.n_symbols - row * n_lanes)
            states = self._states[:in_use]
            slot = states & _MASK
            out[row, :in_use] = symbol = table.lookup[which[row, :in_use], slot]
            frequency, start = (of[which[row, :in_use], symbol] for of in (table.frequency, table.start))
            states[:] = frequency * (states >> np.uint64(PRECISION_BITS)) + slot - start
            low = np.flatnonzero(states < _REST)
            states[low] = states[low] << np.uint64(16) | self._words[self._used : self._used + len(low)]
            self._used += len(low)
            if self._used > self._n_words:
                break
        return out.reshape(-1)[: run.n_symbols]

    def _read_fast(self, run: Run) -> UInt8[np.ndarray, " symbols"]:
        table, rows, out = run.book, run.merged, np.empty(run.n_symbols, np.uint8)
        used = compiled(loops.decode)(
            self._words,
            self._n_words,
            self._used,
            self._states,
            rows.table,
            rows.lengths,
            table.lookup,
            table.interval,
            out,
        )
        self._used = int(used)
        return out


def lane_count(n_bytes: int) -> int:
    """Lanes for a part of about this length: states of 4 bytes take at most a hundredth of it.

    >>> lane_count(100), lane_count(8_000), lane_count(10_000_000)
    (1, 16, 256)
    """
    return 1 << min(MAX_LANE_BITS, max(0, (n_bytes // 400).bit_length() - 1))
