"""The finest step whose message fits a cap."""

from collections.abc import Callable

from kvferry.codec.ecsq.message import Message, Written
from kvferry.errors import BudgetTooSmall
from kvferry.wire import Frame, packed_bytes

_LINES = 6
"""Steps tried along lines, before the rest is halved."""


def finest(
    first: int, last: int, max_bytes: int, message: Message, build: Callable[[Written], Frame]
) -> Frame:
    """The frame of the finest step from `first` to `last` that takes at most `max_bytes`.

    Searches among estimated lengths, which are a byte or two off, and then trusts nothing but built frames.
    Raises `BudgetTooSmall` with the length at `last`.
    """
    fits, finer = _search(first, last, max_bytes, message)
    frame = build(fits)
    while (size := frame_bytes(frame)) > max_bytes:
        if fits.step == last:
            raise BudgetTooSmall(max_bytes, size)
        fits, finer = message.at(fits.step + 1), None
        frame = build(fits)
    likely = max_bytes + fits.n_bytes - size + _doubt(max_bytes)
    while finer is not None and finer.n_bytes <= likely and frame_bytes(closer := build(finer)) <= max_bytes:
        frame = closer
        finer = message.at(finer.step - 1) if finer.step > first else None
    return frame


def frame_bytes(frame: Frame) -> int:
    """`len(pack(frame))` of a frame with the full header."""
    return packed_bytes([len(segment.body) for segment in frame.segments])


def _doubt(max_bytes: int) -> int:
    """By how much estimates of neighbours are off, one from the other: some bits a lane, of 400 bytes each."""
    return max_bytes // 1024 + 2


def _search(first: int, last: int, max_bytes: int, message: Message) -> tuple[Written, Written | None]:
    """The finest step that seems to fit, or `last`; and the step before, which does not.

    Length falls ever more slowly with the step, at first by 1/64 bit a number: a line along two steps that are too
    fine leads to one that is so too, a line between steps on either side to one that fits.
    """
    fine = message.at(first)
    if fine.n_bytes <= max_bytes:
        return fine, None
    coarse, slope, tries = message.at(last), message.n_numbers / 512, 0
    if coarse.n_bytes > max_bytes + 2 * _doubt(max_bytes):
        return coarse, None
    while (width := coarse.step - fine.step) > 1:
        steepest = max(slope, (fine.n_bytes - coarse.n_bytes) / width, 1 / 64)
        ahead = round((fine.n_bytes - max_bytes) / steepest) if tries < _LINES else width // 2
        one = message.at(fine.step + min(max(ahead, 1), width - 1))
        tries += 1
        if one.n_bytes > max_bytes:
            slope = (fine.n_bytes - one.n_bytes) / (one.step - fine.step)
            fine = one
        else:
            slope, coarse = 0.0, one
    return coarse, fine
