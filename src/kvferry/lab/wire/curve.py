"""Bits against quality: a family of codec settings as a curve, read off at a given quality.

Rule 1: a curve is interpolated in log KL, linearly in bits, between measured points; it is never extended.
Rule 2: families are compared at the baseline's own KL, the one that its native setting has.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_FLOOR = 1e-12  # a KL of zero has no logarithm


@dataclass(frozen=True)
class Curve:
    """`(bits per element, KL)` pairs, in any order."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> "Curve":
        return cls(tuple(sorted(points)))

    def bits_at(self, kl: float) -> float | None:
        """Bits where the curve crosses `kl`, the most if it does so twice; None beyond its ends.

        >>> Curve.of([(4.0, 0.01), (2.0, 1.0)]).bits_at(0.1)
        3.0
        """
        crossings = [_between(low, high, kl) for low, high in pairwise(self.points)]
        return max((bits for bits in crossings if bits is not None), default=None)

    def ratio_to(self, bits: float, kl: float) -> float | None:
        """What share of a baseline's bits this family needs for the baseline's KL."""
        own = self.bits_at(kl)
        return None if own is None else own / bits


def _between(low: tuple[float, float], high: tuple[float, float], kl: float) -> float | None:
    if not min(low[1], high[1]) <= kl <= max(low[1], high[1]):
        return None
    first, last, wanted = (math.log(max(x, _FLOOR)) for x in (low[1], high[1], kl))
    share = (wanted - first) / (last - first) if last != first else 0.0
    return low[0] + share * (high[0] - low[0])


def median(values: Iterable[float | None]) -> float | None:
    """None where a value is missing, or all are: what is left would be a choice.

    >>> median([0.5, 0.7, 0.6]), median([0.5, None, 0.7])
    (0.6, None)
    """
    known = list(values)
    return None if not known or None in known else statistics.median(v for v in known if v is not None)
