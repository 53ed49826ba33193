"""Where the time of one question goes: single items, one after the other, medians by stage."""

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TypeVar

from kvferry.kv import Group
from kvferry.lab.arms import Arm, Reading
from kvferry.lab.items import Batch
from kvferry.lab.peer import Peer
from kvferry.lab.run import MAX_NEW_TOKENS
from kvferry.session.exchange import Remote, call
from kvferry.session.sender import Sender

N_SINGLE = 20
_N_WARM = 3  # first calls allocate; they are not counted

T = TypeVar("T")
Times = dict[str, float]

STAGES = ("capture", "encode", "link", "decode", "align", "prefill", "generate", "total")
"""In the order in which they happen."""


async def stage_times(
    peer: Peer, sender: Sender, arm: Arm, batches: Sequence[Batch], mean: tuple[Group, ...]
) -> Times:
    """Median milliseconds of each stage over about 20 items.

    capture and encode happen at the sender, decode, align, prefill (what the receiver reads itself and takes in) and
    generate at the receiver; `link` is what is left of the round trip. `total` is the median of the sums.
    """
    singles = [Batch((item,)) for batch in batches for item in batch.items][: N_SINGLE + _N_WARM]
    remote = await call(peer.host, peer.port, sender.hello())
    try:
        times = [await _single(remote, sender, arm, single, mean) for single in singles]
    finally:
        await remote.close()
    return _medians(times[_N_WARM:] or times)


async def _single(remote: Remote, sender: Sender, arm: Arm, batch: Batch, mean: tuple[Group, ...]) -> Times:
    kv, capture_ms = _timed(lambda: sender.capture(batch.contexts))
    messages, encode_ms = _timed(lambda: arm.pack(sender, Reading(batch, kv, mean)))
    start = time.perf_counter()
    (reply,) = await remote.ask(messages, batch.questions, max_new_tokens=MAX_NEW_TOKENS)
    link_ms = (time.perf_counter() - start) * 1e3 - sum(reply.stages_ms.values())
    times = {"encode": encode_ms, "link": link_ms, **reply.stages_ms}
    times = {"capture": capture_ms, **times} if arm.codec else times
    return {**times, "total": sum(times.values())}


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - start) * 1e3


def _medians(times: Iterable[Times]) -> Times:
    rows = list(times)
    return {stage: median(row[stage] for row in rows) for stage in STAGES if stage in rows[0]}
