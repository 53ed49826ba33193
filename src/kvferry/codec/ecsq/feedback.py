"""The loop of `shaping.py` for numba: tokens innermost."""

from typing import Any

import numpy as np


def feed_back(target: Any, feedback: Any, step: Any, centres: Any) -> None:
    """Round channel after channel; subtract what its error means for those to come. In place."""
    heads, dim, tokens = target.shape
    error = np.empty(tokens, np.float32)
    original = np.empty((dim, tokens), np.float32)
    for head in range(heads):
        original[:] = target[head]
        for place in range(dim):
            size = step[head, place]
            inverse = np.float32(1) / size
            for token in range(tokens):
                whole = np.rint(target[head, place, token] * inverse)
                most = np.abs(whole)
                if most < centres.shape[2]:
                    whole = centres[head, place, np.int64(most)] * np.sign(whole)
                error[token] = whole * size - original[place, token]
            for later in range(place + 1, dim):
                share = feedback[head, later, place]
                for token in range(tokens):
                    target[head, later, token] -= share * error[token]
