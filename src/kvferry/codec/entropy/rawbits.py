"""Numbers of given widths as one string of bits, lowest bit first: what no table predicts."""

import numpy as np
from jaxtyping import Int64

from kvferry.errors import Malformed

Numbers = Int64[np.ndarray, " n"]


def write_bits(values: Numbers, widths: Numbers) -> bytes:
    """The lowest `widths[i]` bits of each value, one after the other; unused bits of the last byte are 0.

    >>> write_bits(np.array([1, 6]), np.array([1, 3])).hex()
    '0d'
    """
    which, place = _places(widths)
    return np.packbits((values[which] >> place & 1).astype(np.uint8), bitorder="little").tobytes()


class BitReader:
    """Reads what `write_bits` wrote, some numbers at a time.

    >>> reader = BitReader(bytes.fromhex("0d"))
    >>> reader.read(np.array([1, 3])).tolist()
    [1, 6]
    >>> reader.close()
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        self._used = 0

    def read(self, widths: Numbers) -> Numbers:
        """The next numbers; `Malformed` if the bits end before."""
        total = int(widths.sum())
        bits = self._bits[self._used : self._used + total]
        if len(bits) < total:
            what = f"{len(self._bits)} raw bits, {self._used + total} are needed"
            raise Malformed(what, cure="Ask for the frame again")
        self._used += total
        _, place = _places(widths)
        upto = np.concatenate([[0], np.cumsum(bits.astype(np.int64) << place)])
        ends = np.cumsum(widths)
        return upto[ends] - upto[ends - widths]

    def close(self) -> None:
        """Raise `Malformed` unless less than a byte is left, and that is 0."""
        rest = self._bits[self._used :]
        if len(rest) > 7 or rest.any():
            raise Malformed(f"{len(rest)} raw bits are left over", cure="Write it with kvferry.codec")


def _places(
    widths: Numbers,
) -> tuple[Int64[np.ndarray, " bits"], Int64[np.ndarray, " bits"]]:
    """For every bit of the string the number that it belongs to, and its place there."""
    which = np.repeat(np.arange(len(widths)), widths)
    starts = np.cumsum(widths) - widths
    return which, np.arange(len(which)) - starts[which]
