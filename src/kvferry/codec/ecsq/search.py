"""The finest step whose message fits a cap."""

from collections.abc import Callable

from kvferry.errors import BudgetTooSmall
from kvferry.wire import Frame, packed_bytes


def finest(
    first: int,
    last: int,
    max_bytes: int,
    estimate: Callable[[int], int],
    build: Callable[[int], Frame],
) -> Frame:
    """The frame of the finest step from `first` to `last` that takes at most `max_bytes`.

    Bisects on estimated lengths, which are a byte or two off, and then trusts nothing but built frames.
    Raises `BudgetTooSmall` with the length at `last`.
    """
    step = _bisect(first, last, max_bytes, estimate)
    frame = build(step)
    while (size := frame_bytes(frame)) > max_bytes:
        if step == last:
            raise BudgetTooSmall(max_bytes, size)
        step += 1
        frame = build(step)
    while step > first and frame_bytes(finer := build(step - 1)) <= max_bytes:
        step, frame = step - 1, finer
    return frame


def frame_bytes(frame: Frame) -> int:
    """`len(pack(frame))` of a frame with the full header."""
    return packed_bytes([len(segment.body) for segment in frame.segments])


def _bisect(first: int, last: int, max_bytes: int, estimate: Callable[[int], int]) -> int:
    if estimate(first) <= max_bytes:
        return first
    while first < last:
        middle = (first + last) // 2
        if estimate(middle) <= max_bytes:
            last = middle
        else:
            first = middle + 1
    return last
