"""The frozen probability tables of `ecsq`: a logistic number of given deviation, rounded to whole steps.

Table t = 0 ... 24 is for a deviation of 2**((t - 12) / 4) steps. It has the symbols -reach ... reach and, last, ESCAPE
for whatever lies beyond. Frequencies are whole and sum to 2**14. They are part of the format: they were computed once,
in decimal arithmetic, by `derive`, and are read from `tables.bin`; a test holds their SHA-256.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt32, UInt64

PRECISION_BITS = 14
TOTAL = 1 << PRECISION_BITS
LOWEST, HIGHEST = -12, 12
"""Quarter octaves of deviation over step that the first and the last table stand for."""
N_TABLES = HIGHEST - LOWEST + 1
N_CENTROIDS = 4
"""Magnitudes 0 to 3 are decoded to the mean of their cell, larger ones to its middle."""
COST_UNIT = 4096
"""Costs are whole numbers of 1/4096 bit, so that sums do not depend on their order."""
INVERSE_BITS = 46
"""x // f == x * ceil(2**46 / f) >> 46 for f <= 2**14 and x < 2**18 * f, and the product stays below 2**64."""
_FILE = Path(__file__).parent / "tables.bin"
_WIDTH = 128


@dataclass(frozen=True, eq=False)
class Book:
    """What rANS needs of tables that lie side by side, `[table, symbol]`; unused entries are 0."""

    frequency: UInt32[np.ndarray, "tables symbols"]
    start: UInt32[np.ndarray, "tables symbols"]
    lookup: UInt8[np.ndarray, "tables slots"]
    """The symbol of each of the 2**14 slots."""
    interval: UInt32[np.ndarray, "tables symbols"]
    """Frequency, and start in the upper 16 bits."""
    inverse: UInt64[np.ndarray, "tables symbols"]
    """2**46 / frequency, rounded up."""
    cost: Int64[np.ndarray, "tables symbols"]


@dataclass(frozen=True, eq=False)
class Tables(Book):
    """The tables of the format."""

    reach: Int64[np.ndarray, " tables"]
    entropy: Int64[np.ndarray, " tables"]
    """The mean cost of a symbol."""
    centroid: Float32[np.ndarray, "tables magnitudes"]


@cache
def tables() -> Tables:
    """The tables of the format.

    >>> tables().frequency.sum(axis=1).tolist() == [TOTAL] * N_TABLES
    True
    """
    data = np.frombuffer(_FILE.read_bytes(), "<u2").astype(np.uint32)
    reach = np.array([_reach(table) for table in range(N_TABLES)], np.int64)
    frequency = np.zeros((N_TABLES, _WIDTH), np.uint32)
    used = np.arange(_WIDTH) < (2 * reach + 2)[:, None]
    frequency[used] = data[: used.sum()]
    book = book_of(frequency)
    return Tables(
        **vars(book),
        reach=reach,
        entropy=(frequency * book.cost).sum(axis=1) // TOTAL,
        centroid=(data[used.sum() :].reshape(N_TABLES, N_CENTROIDS) / 2**14).astype(np.float32),
    )


def book_of(frequency: UInt32[np.ndarray, "tables symbols"]) -> Book:
    """Tables of these frequencies; each row sums to 2**14."""
    start = (np.cumsum(frequency, axis=1) - frequency).astype(np.uint32)
    symbols = np.arange(frequency.shape[1], dtype=np.uint8)
    return Book(
        frequency=frequency,
        start=start,
        lookup=np.stack([np.repeat(symbols, row) for row in frequency]),
        interval=start << np.uint32(16) | frequency,
        inverse=-(-(1 << INVERSE_BITS) // np.maximum(frequency, 1).astype(np.int64)).astype(np.uint64),
        cost=np.rint(COST_UNIT * (PRECISION_BITS - np.log2(np.maximum(frequency, 1)))).astype(np.int64),
    )


def derive() -> bytes:
    """The content of `tables.bin`, computed anew: frequencies, then centroids in 2**-14 steps, as 16-bit numbers."""
    rows = [_frequencies(table) for table in range(N_TABLES)]
    cells = [[_centroid(table, q) for q in range(N_CENTROIDS)] for table in range(N_TABLES)]
    return np.array([number for row in (*rows, *cells) for number in row], "<u2").tobytes()


def _reach(table: int) -> int:
    return math.ceil(5 * 2 ** ((table + LOWEST) / 4)) + 1


def _frequencies(table: int) -> list[int]:
    """One slot for each symbol, the others in proportion, rounded down; what is left goes to symbol 0."""
    reach = _reach(table)
    with localcontext() as context:
        context.prec = 40
        edges = [_cdf(Decimal(2 * q - 1) / 2, table) for q in range(-reach, reach + 2)]
        shares = [high - low for low, high in pairwise(edges)]
        shares.append(1 - sum(shares, Decimal(0)))
        spare = TOTAL - len(shares)
        frequencies = [1 + int(share * spare) for share in shares]
    frequencies[reach] += TOTAL - sum(frequencies)
    return frequencies


def _scale(table: int) -> Decimal:
    """The logistic distribution's own scale: deviation * sqrt(3) / pi, in steps."""
    pi = Decimal("3.14159265358979323846264338327950288419717")
    return Decimal(2) ** (Decimal(table + LOWEST) / 4) * Decimal(3).sqrt() / pi


def _cdf(x: Decimal, table: int) -> Decimal:
    return 1 / (1 + (-x / _scale(table)).exp())


def _centroid(table: int, q: int) -> int:
    """Mean of the cell [q - 1/2, q + 1/2] in units of 2**-14 step."""
    if q == 0:
        return 0
    with localcontext() as context:
        context.prec = 40
        scale = _scale(table)
        low, high = Decimal(2 * q - 1) / 2 / scale, Decimal(2 * q + 1) / 2 / scale
        mass = 1 / (1 + (-high).exp()) - 1 / (1 + (-low).exp())
        return int((scale * (_moment(high) - _moment(low)) / mass * (1 << 14)).to_integral_value())


def _moment(x: Decimal) -> Decimal:
    """An antiderivative of x times the density of the standard logistic distribution."""
    return x / (1 + (-x).exp()) - x - (1 + (-x).exp()).ln()


if __name__ == "__main__":
    _FILE.write_bytes(derive())
