"""Probabilities of the thirds of a cell, from the frozen tables by integer arithmetic: nothing is learned or sent.

The thirds of cell m of a row are the numbers 3 m - 1, 3 m and 3 m + 1 of the row's table, one layer down. A *context*
is a table and |m|, as far as the table reaches; beyond, and in rows of levels without a table, all thirds are alike.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float32, Int64

from kvferry.codec.entropy.tables import HIGHEST, LOWEST, N_CENTROIDS, N_TABLES, TOTAL, Book, book_of, tables

_ALIKE = (1, 1, 1)

Numbers = Int64[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Contexts:
    """Context c has the tables 2 c, is it the outer third, and 2 c + 1, is it the inner one of the others."""

    first: Int64[np.ndarray, " tables"]
    """The context of m = 0 of each frozen table."""
    count: Int64[np.ndarray, " tables"]
    book: Book
    centre: Float32[np.ndarray, " contexts"]
    """The mean of what is inner or middle; that of the last context lies at 3 |m| - 1/2."""

    @property
    def alike(self) -> int:
        """The context in which all thirds are alike."""
        return len(self.centre) - 1

    def of(self, level: Numbers, size: Numbers) -> Numbers:
        """The contexts of cells of these sizes |m| in rows of these levels."""
        table = np.minimum(level, HIGHEST) - LOWEST
        known = (level <= HIGHEST) & (size < self.count[table])
        return np.where(known, self.first[table] + size, self.alike)

    def open_centre(self, level: Numbers, cell: Numbers) -> Float32[np.ndarray, " n"]:
        """Where in cell m, in steps one layer down, what is not its outer third is decoded to."""
        size = np.abs(cell)
        context = self.of(level, size)
        inner = np.where(context == self.alike, (3 * size - 0.5).astype(np.float32), self.centre[context])
        return outward(cell).astype(np.float32) * inner


def outward(cell: Numbers) -> Numbers:
    """The direction away from zero; that of 0 is up."""
    return np.where(cell < 0, -1, 1)


@cache
def contexts() -> Contexts:
    """The contexts of the format.

    >>> found = contexts()
    >>> found.alike, found.book.frequency[:2].tolist()
    (102, [[16372, 12], [16372, 12]])
    """
    count = (tables().reach - 1) // 3 + 1
    cells = [(table, size) for table in range(N_TABLES) for size in range(count[table])]
    thirds = [*(_thirds(table, size) for table, size in cells), _ALIKE]
    rows = [
        row for inner, middle, outer in thirds for row in (_row(outer, inner + middle), _row(inner, middle))
    ]
    centre = [*(_centre(table, size) for table, size in cells), 0.0]
    return Contexts(
        np.cumsum(count) - count, count, book_of(np.array(rows, np.uint32)), np.array(centre, np.float32)
    )


def _thirds(table: int, size: int) -> tuple[int, int, int]:
    """Frequencies of the inner, the middle and the outer third."""
    at = int(tables().reach[table]) + 3 * size
    inner, middle, outer = (int(number) for number in tables().frequency[table, at - 1 : at + 2])
    return inner, middle, outer


def _row(yes: int, no: int) -> tuple[int, int]:
    """Frequencies of the symbols 0, no, and 1, yes: in proportion, rounded half up, neither of them 0."""
    share = (yes * TOTAL + (yes + no) // 2) // (yes + no)
    share = min(max(share, 1), TOTAL - 1)
    return TOTAL - share, share


def _centre(table: int, size: int) -> float:
    inner, middle, _ = _thirds(table, size)
    weighted = inner * _centroid(table, 3 * size - 1) + middle * _centroid(table, 3 * size)
    return weighted / (inner + middle) / TOTAL


def _centroid(table: int, number: int) -> int:
    """In 2**-14 step, as the frozen tables have it."""
    size = abs(number)
    if size >= N_CENTROIDS:
        return number * TOTAL
    return int(tables().centroid[table, size] * TOTAL) * (-1 if number < 0 else 1)
