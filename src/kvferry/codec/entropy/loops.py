"""The loops of `rans.py` for numba. Same words, same states.

No branch depends on the numbers, but for the loops themselves: a processor cannot guess which lane is full. Indices are
unsigned, so that none is checked for being negative. Arrays have no shapes in their signatures: numba compiles
what `fast.compiled` unwraps.
"""

from typing import Any

import numpy as np

from kvferry.codec.entropy.tables import INVERSE_BITS, PRECISION_BITS, TOTAL

_LIMIT_BITS = np.uint64(32 - PRECISION_BITS)
_PRECISION = np.uint64(PRECISION_BITS)
_TOTAL = np.uint64(TOTAL)
_INVERSE = np.uint64(INVERSE_BITS)
_ONE = np.uint64(1)
_WORD_LOG2 = np.uint64(4)


def encode(
    symbols: Any, table: Any, lengths: Any, frequency: Any, start: Any, inverse: Any, states: Any, words: Any
) -> Any:
    """Fill `words`, one longer than needed, from its end, move `states` on, and return how many words there are."""
    mask = np.uint64(len(states)) - _ONE
    at, free = np.uint64(len(symbols)), np.uint64(len(words))
    for row in range(len(lengths) - 1, -1, -1):
        shares, starts, inverses = frequency[table[row]], start[table[row]], inverse[table[row]]
        for _ in range(lengths[row]):
            at -= _ONE
            symbol, state = symbols[at], states[at & mask]
            share = np.uint64(shares[symbol])
            full = np.uint64(state >> _LIMIT_BITS >= share)
            words[free - _ONE] = np.uint16(state)
            free -= full
            state >>= full << _WORD_LOG2
            quotient = state * inverses[symbol] >> _INVERSE
            states[at & mask] = state + quotient * (_TOTAL - share) + np.uint64(starts[symbol])
    return np.uint64(len(words)) - free


def decode(
    words: Any,
    n_words: Any,
    used: Any,
    states: Any,
    table: Any,
    lengths: Any,
    lookup: Any,
    interval: Any,
    out: Any,
) -> int:
    """Fill `out`, move `states` on, and return the words used so far; more than there are if they did not suffice.

    Behind its `n_words`, `words` holds one more for each lane: whether they suffice is only seen once a row of lanes.
    """
    n_lanes = np.uint64(len(states))
    at, used = np.uint64(0), np.uint64(used)
    for row in range(len(lengths)):
        symbol_of, intervals = lookup[table[row]], interval[table[row]]
        end = at + np.uint64(lengths[row])
        while at < end:
            first = at - (at & (n_lanes - _ONE))
            stop = min(first + n_lanes, end)
            while at < stop:
                state = states[at - first]
                slot = state & (_TOTAL - _ONE)
                symbol = symbol_of[slot]
                out[at] = symbol
                both = intervals[symbol]
                state = np.uint64(both & 0xFFFF) * (state >> _PRECISION) + slot - np.uint64(both >> 16)
                filled = state << np.uint64(16) | np.uint64(words[used])
                low = state < np.uint64(1 << 16)
                used += np.uint64(low)
                states[at - first] = filled if low else state
                at += _ONE
            if used > np.uint64(n_words):
                return used
    return used


def cost(symbols: Any, table: Any, lengths: Any, costs: Any) -> Any:
    """The sum of the costs of all symbols."""
    total, at = np.int64(0), np.uint64(0)
    for row in range(len(lengths)):
        of_symbol = costs[table[row]]
        end = at + np.uint64(lengths[row])
        while at < end:
            total += np.int64(of_symbol[symbols[at]])
            at += _ONE
    return total
