"""How many of an order there is room for."""

from bisect import bisect_left
from collections.abc import Callable


def most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest of `low` to `high` that fits, where what fits for a number fits for every smaller one.

    `low` is taken to fit, and never asked about.

    >>> most(1, 10, lambda n: n * n <= 40)
    6
    """
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda number: not fits(number))
