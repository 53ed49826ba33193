"""Which chunks a message is cut into, and in which order they are written: what saves most per byte first.

A chunk costs about 16 bytes whatever it holds, so small messages have few; and a message that stops at any byte should
have little in the chunk that it stops in, so chunks grow with what comes before them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from kvferry.codec.progressive.chunk import Place

CHUNK_BYTES = 16
"""Segment, place and states of one chunk."""
_BASE_BYTES = 1 << 14
"""Chunks of the coarsest layer, all of which come first."""
_LEAST_BYTES, _SHARE = 320, 1 / 12
"""Of a later chunk: at least these bytes, and this share of what comes before its stage."""


def places(n_bytes: Sequence[Sequence[float]]) -> list[Place]:
    """The chunks of a message, stage by stage, from what each stage of each block takes; none where it is 0 blocks."""
    found, before = [], 0.0
    for stage, each in enumerate(zip(*n_bytes, strict=True)):
        least = max(_LEAST_BYTES, _SHARE * before) if stage else _BASE_BYTES
        found += [Place(stage, first, count) for first, count in _runs(each, least)]
        before += sum(each)
    return found


def by_gain(chunks: Sequence[Place], gain: Callable[[Place], float]) -> list[Place]:
    """The chunks in order of gain, each behind those that it refines."""
    left, written = set(chunks), []
    while left:
        waiting = {(place.stage, block) for place in left for block in place.blocks}
        ready = [place for place in left if all((place.stage - 1, b) not in waiting for b in place.blocks)]
        best = min(ready, key=lambda place: (-gain(place) if place.stage else -inf, place))
        left.remove(best)
        written.append(best)
    return written


def refines(place: Place, written: Iterable[Place]) -> bool:
    """Whether all that a chunk refines is among these."""
    there = {block for other in written if other.stage == place.stage - 1 for block in other.blocks}
    return place.stage == 0 or there.issuperset(place.blocks)


def _runs(n_bytes: Sequence[float], least: float) -> Iterator[tuple[int, int]]:
    """Runs of blocks that take `least` bytes each; what is left over joins the last."""
    firsts, taken, left = [0], 0.0, sum(n_bytes)
    for block, size in enumerate(n_bytes):
        if taken >= least and left >= least:
            firsts.append(block)
            taken = 0.0
        taken += size
        left -= size
    for first, end in zip(firsts, [*firsts[1:], len(n_bytes)], strict=True):
        yield first, end - first
