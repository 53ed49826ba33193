"""The loops of `rans.py` for numba. Same words, same states."""

import numpy as np

from kvferry.codec.entropy.tables import PRECISION_BITS

# No signatures with shapes here: these functions are compiled, see `fast.compiled`.


def encode(symbols, table, lengths, frequency, start, states, words):  # noqa: ANN001, ANN201
    """Fill `words` from its end, move `states` on, and return how many words there are."""
    n_lanes = len(states)
    mask = n_lanes - 1
    at, free = len(symbols), len(words)
    for row in range(len(lengths) - 1, -1, -1):
        which = table[row]
        for index in range(at - 1, at - lengths[row] - 1, -1):
            symbol = symbols[index]
            state = states[index & mask]
            share = np.uint64(frequency[which, symbol])
            if state >= share << np.uint64(32 - PRECISION_BITS):
                free -= 1
                words[free] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            # Exact: (state + 1/2) / share is at least 2**-15 away from a whole number, far beyond the rounding.
            quotient = np.uint64((np.float64(state) + 0.5) / np.float64(share))
            rest = state - quotient * share
            states[index & mask] = (
                (quotient << np.uint64(PRECISION_BITS)) + rest + np.uint64(start[which, symbol])
            )
        at -= lengths[row]
    return len(words) - free


def decode(words, used, states, table, lengths, lookup, frequency, start, out):  # noqa: ANN001, ANN201
    """Fill `out`, move `states` on, and return the words used so far; more than there are if they did not suffice."""
    n_lanes = len(states)
    mask = n_lanes - 1
    last = len(words)
    at = 0
    for row in range(len(lengths)):
        which = table[row]
        for index in range(at, at + lengths[row]):
            state = states[index & mask]
            slot = state & np.uint64((1 << PRECISION_BITS) - 1)
            symbol = lookup[which, slot]
            out[index] = symbol
            state = np.uint64(frequency[which, symbol]) * (state >> np.uint64(PRECISION_BITS)) + slot
            state -= np.uint64(start[which, symbol])
            if state < np.uint64(1 << 16):
                if used >= last:
                    return last + 1
                state = state << np.uint64(16) | np.uint64(words[used])
                used += 1
            states[index & mask] = state
        at += lengths[row]
    return used
