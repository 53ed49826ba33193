"""How items were marked, whatever the task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Marks:
    """Item by item; the quality of several is the sum of `score` over the sum of `weight`.

    Recall: 1 for the right word, of 1. Stories: nats per character won against no prefix, of those that the whole
    prefix as text wins. `nll`: nats of the right answer, or per character.
    """

    score: Numbers
    weight: Numbers
    nll: Numbers


def joined(parts: Sequence[Marks]) -> Marks:
    """One after the other."""
    score, weight, nll = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("score", "weight", "nll")
    )
    return Marks(score, weight, nll)
