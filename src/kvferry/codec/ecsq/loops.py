"""The loops over the numbers of a block for numba; channels innermost, because they lie side by side.

Symbols lie the other way round, tokens innermost: a head at a time is turned in a tile that stays in the cache.
Arrays have no shapes in their signatures: numba compiles what `fast.compiled` unwraps.
"""

import math
from typing import Any

import numpy as np

GRID_BITS, FINEST_GRID = 16, 126
"""Numbers are rounded to 2**-16 of the channel's largest, and never to less than 2**-126: the sums of `stats.py`."""


def measure(block: Any, low: Any, high: Any, scale: Any, total: Any, squares: Any) -> None:
    """Fill in, for each channel: extremes over tokens, scale, and sums of rounded numbers and of their squares.

    NaN stays where it comes: no comparison with it is true.
    """
    heads, tokens, dim = block.shape
    for head in range(heads):
        one = slice(head * dim, head * dim + dim)
        least, most, by, sums, sums2 = low[one], high[one], scale[one], total[one], squares[one]
        least[:], most[:], sums[:], sums2[:] = block[head, 0], block[head, 0], 0, 0
        for token in range(tokens):
            row = block[head, token]
            for place in range(dim):
                x = row[place]
                least[place] = x if x < least[place] or x != x else least[place]
                most[place] = x if x > most[place] or x != x else most[place]
        for place in range(dim):
            peak = max(abs(np.float64(least[place])), abs(np.float64(most[place])))
            exponent = math.frexp(peak)[1] if peak < np.inf else 1
            by[place] = math.ldexp(1.0, min(GRID_BITS - exponent, FINEST_GRID))
        for token in range(tokens):
            row = block[head, token]
            for place in range(dim):
                whole = np.float64(np.rint(row[place] * by[place]))
                sums[place] += whole
                sums2[place] += whole * whole


def symbols(
    block: Any, tokens: Any, mean: Any, inverse: Any, reach: Any, place_of: Any, out: Any, beyond: Any
) -> None:
    """Write the symbols of `tokens` behind the places `place_of` of their channels' rows; mark rows that escape."""
    heads, _, dim = block.shape
    tile = np.empty((len(tokens), dim), np.uint8)
    escapes = np.empty(dim, np.uint8)
    for head in range(heads):
        one = slice(head * dim, head * dim + dim)
        middle, by, reaches, places = mean[one], inverse[one], reach[one], place_of[one]
        escapes[:] = 0
        for index in range(len(tokens)):
            row, to = block[head, tokens[index]], tile[index]
            for place in range(dim):
                number, most = np.rint((row[place] - middle[place]) * by[place]), reaches[place]
                escaped = abs(number) > most
                to[place] = np.uint8(np.int32(most + np.float32(1) if escaped else number) + np.int32(most))
                escapes[place] |= np.uint8(escaped)
        for place in range(dim):
            if places[place] >= 0:
                beyond[head * dim + place] |= escapes[place] > 0
                to = out[places[place] : places[place] + len(tokens)]
                for index in range(len(tokens)):
                    to[index] = tile[index, place]


def values(
    out: Any,
    tokens: Any,
    symbols: Any,
    place_of: Any,
    reach: Any,
    centre1: Any,
    centre2: Any,
    centre3: Any,
    step: Any,
    mean: Any,
    escaped: Any,
) -> None:
    """Write the numbers of `tokens` from the symbols in their channels' rows; mark rows that hold an escape.

    Magnitudes 1 to 3 have centres of their own. A silent channel, whose place is -1, is its mean.
    """
    heads, _, dim = out.shape
    tile = np.empty((len(tokens), dim), np.uint8)
    for head in range(heads):
        one = slice(head * dim, head * dim + dim)
        middle, by, reaches, places = mean[one], step[one], reach[one], place_of[one]
        first, second, third = centre1[one], centre2[one], centre3[one]
        for place in range(dim):
            if places[place] < 0:
                tile[:, place] = np.uint8(reaches[place])
                continue
            row = symbols[places[place] : places[place] + len(tokens)]
            escape, found = np.uint8(2 * reaches[place] + 1), np.uint8(0)
            for index in range(len(tokens)):
                found |= np.uint8(row[index] == escape)
            escaped[head * dim + place] |= found > 0
            for index in range(len(tokens)):
                tile[index, place] = row[index]
        for index in range(len(tokens)):
            row, to = tile[index], out[head, tokens[index]]
            for place in range(dim):
                number = np.float32(np.int32(row[place])) - reaches[place]
                # One choice a line: so it is done for many channels at once.
                size = abs(number)
                size = first[place] if size == np.float32(1) else size
                size = second[place] if size == np.float32(2) else size
                size = third[place] if size == np.float32(3) else size
                to[place] = (-size if number < np.float32(0) else size) * by[place] + middle[place]
