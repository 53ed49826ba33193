"""Arrays of whole numbers as varints (wire/varint.py), all at once."""

import numpy as np
from jaxtyping import Int, UInt8

from kvferry.errors import Malformed

_MAX_BYTES = 5
"""35 bits: sums over any frame stay far from overflow."""


def write_varints(values: Int[np.ndarray, " n"]) -> bytes:
    """The varints of `values`, each 0 <= value < 2**35, one after the other.

    >>> write_varints(np.array([1, 300])).hex()
    '01ac02'
    """
    shifts = 7 * np.arange(_MAX_BYTES)
    digits = values[:, None] >> shifts
    needed = (digits > 0) | (shifts == 0)
    more = np.zeros_like(needed)
    more[:, :-1] = needed[:, 1:]
    return (digits & 0x7F | more << 7).astype(np.uint8)[needed].tobytes()


def read_varints(body: bytes) -> Int[np.ndarray, " n"]:
    """The inverse; `Malformed` unless each number is whole and below 2**35.

    >>> read_varints(bytes.fromhex("01ac02")).tolist()
    [1, 300]
    """
    data: UInt8[np.ndarray, " n"] = np.frombuffer(body, np.uint8)
    if not len(data):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    lengths = ends - starts[: len(ends)] + 1
    if data[-1] >= 0x80 or lengths.max() > _MAX_BYTES:
        raise Malformed("a list of numbers is cut or holds one above 2**35", cure="Write each number whole")
    shifts = 7 * (np.arange(len(data)) - np.repeat(starts, lengths))
    return np.add.reduceat((data & 0x7F).astype(np.int64) << shifts, starts)


def zigzag(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Signed to unsigned, small to small: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return (values << 1) ^ (values >> 63)


def unzigzag(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The inverse of `zigzag`."""
    return (values >> 1) ^ -(values & 1)
