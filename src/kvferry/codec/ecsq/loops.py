"""The loops over the numbers of a block for numba; channels innermost, because they lie side by side.

No signatures with shapes here: these functions are compiled, see `fast.compiled`.
"""

import numpy as np


def extremes(block, low, high):  # noqa: ANN001, ANN201
    """Lower `low` and raise `high`, `[heads, dim]`, to the extremes over tokens. NaN stays where it comes."""
    heads, tokens, dim = block.shape
    for head in range(heads):
        for token in range(tokens):
            for place in range(dim):
                x = block[head, token, place]
                # No comparison with NaN is true: once there, it stays.
                if x < low[head, place] or np.isnan(x):
                    low[head, place] = x
                if x > high[head, place] or np.isnan(x):
                    high[head, place] = x


def sums(block, scale, total, squares):  # noqa: ANN001, ANN201
    """Add rounded numbers and their squares to `[heads, dim]`."""
    heads, tokens, dim = block.shape
    for head in range(heads):
        for token in range(tokens):
            for place in range(dim):
                whole = np.float64(np.rint(block[head, token, place] * scale[head, place]))
                total[head, place] += whole
                squares[head, place] += whole * whole


def symbols(block, tokens, mean, inverse, reach, place_of, out, beyond):  # noqa: ANN001, ANN201
    """Write the symbols of `tokens` behind the places `place_of` of their channels' rows; mark rows that escape."""
    heads, _, dim = block.shape
    for head in range(heads):
        for index in range(len(tokens)):
            token = tokens[index]
            for place in range(dim):
                channel = head * dim + place
                if place_of[channel] < 0:
                    continue
                number = np.rint((block[head, token, place] - mean[channel]) * inverse[channel])
                most = reach[channel]
                if np.abs(number) > most:
                    beyond[channel] = True
                    out[place_of[channel] + index] = np.uint8(2 * most + 1)
                else:
                    out[place_of[channel] + index] = np.uint8(np.int32(number) + most)


def values(out, tokens, symbols, place_of, table, centre, step, mean):  # noqa: ANN001, ANN201
    """Write the numbers of `tokens` from the symbols in their channels' rows; a silent channel is its mean."""
    heads, _, dim = out.shape
    for head in range(heads):
        for index in range(len(tokens)):
            token = tokens[index]
            for place in range(dim):
                channel = head * dim + place
                if place_of[channel] < 0:
                    out[head, token, place] = mean[channel]
                else:
                    number = centre[table[channel], symbols[place_of[channel] + index]]
                    out[head, token, place] = number * step[channel] + mean[channel]
