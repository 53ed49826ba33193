"""The loop of `rebuild.py` for numba: tokens innermost."""

from typing import Any

import numpy as np


def undo_shaping(numbers: Any, coarsest: Any, feedback: Any) -> None:
    """Channel after channel, take what refined it since the coarsest layer off those that follow. In place."""
    heads, dim, tokens = numbers.shape
    refined = np.empty(tokens, np.float32)
    for head in range(heads):
        for place in range(dim):
            for token in range(tokens):
                refined[token] = numbers[head, place, token] - coarsest[head, place, token]
            for later in range(place + 1, dim):
                share = feedback[head, later, place]
                for token in range(tokens):
                    numbers[head, later, token] -= share * refined[token]
