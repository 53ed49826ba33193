"""One way of sending under one cap, on the items of one seed: what was sent, what it was worth, item by item.

Rule 1: an item whose cap cannot be met, or whose message the receiver must refuse, counts as wrong; its nats are those
of a receiver without context.
Rule 2: on a curve such an item costs its cap: so many bytes were there, and bought nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from kvferry.lab.curve.arms import Arm, Sent
from kvferry.lab.curve.caps import Cap
from kvferry.lab.curve.exam import slices
from kvferry.lab.curve.marks import Marks, Numbers, joined
from kvferry.lab.curve.room import Room
from kvferry.link import Meter

_AT_CAP = 0.02
"""Of the cap: a message that leaves so little is at it."""


@dataclass(frozen=True)
class Outcome:
    """Lists run over items. `message_bytes`: None where nothing was sent; `smallest_bytes`: where a cap would have.

    `kept` and `encode_ms` are of caches alone, and missing from lines of older ledgers.
    """

    score: list[float]
    weight: list[float]
    nll: list[float]
    message_bytes: list[int | None]
    request_bytes: list[int]
    smallest_bytes: list[int | None]
    kept: list[float | None] = field(default_factory=list)
    encode_ms: list[float | None] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.score)

    @property
    def n_sent(self) -> int:
        return sum(size is not None for size in self.message_bytes)

    @property
    def smallest_cap(self) -> int | None:
        """What would do for every item; None where it was no cap that was in the way."""
        return max((size for size in self.smallest_bytes if size is not None), default=None)

    @property
    def error(self) -> str | None:
        """Why nothing was sent at all."""
        if self.n_sent:
            return None
        return "BudgetTooSmall" if self.smallest_cap is not None else "CodecNotCovered"

    def charged(self, cap: Cap) -> Numbers:
        """Bytes of each item on a curve, requests included."""
        sizes = [(cap or 0) if size is None else size for size in self.message_bytes]
        return np.array(sizes, float) + np.array(self.request_bytes, float)

    def mean_bytes(self) -> dict[str, float]:
        """Per message that was sent; the link's are all that passed, over the items."""
        meter = Meter()
        for size, request in zip(self.message_bytes, self.request_bytes, strict=True):
            meter.sent["message"] += size or 0
            meter.received["request"] += request
        message = meter.sent["message"] / max(self.n_sent, 1)
        return {
            "message": message,
            "request": meter.received["request"] / self.n,
            "link": meter.total_bytes / self.n,
        }

    def use_of(self, cap: Cap) -> dict[str, float | None]:
        """How much of the cap the messages that were sent leave over, and how many of them nothing to speak of."""
        sizes = np.array([size for size in self.message_bytes if size is not None], float)
        if cap is None or not len(sizes):
            return {"slack_median": None, "share_at_cap": None}
        slack = cap - sizes
        at_cap = float((slack <= max(_AT_CAP * cap, 1)).mean())
        return {"slack_median": float(np.median(slack)), "share_at_cap": at_cap}

    def selected(self) -> dict[str, float | None]:
        """The share of the slots that messages hold."""
        shares = [share for share in self.kept if share is not None]
        if not shares:
            return dict.fromkeys(("kept_mean", "kept_min", "kept_max"))
        return {"kept_mean": fmean(shares), "kept_min": min(shares), "kept_max": max(shares)}

    def latency_ms(self) -> dict[str, float]:
        """Selection and coding, the median over messages."""
        times = [one for one in self.encode_ms if one is not None]
        return {"encode": median(times)} if times else {}


def measure(room: Room, arm: Arm, cap: Cap) -> Outcome:
    """Send and mark all items of a room."""
    sent = [arm.send(room, index, cap) for index in range(room.n)]
    marks = joined([_marked(room, sent[rows], rows) for rows in slices(room.n)])
    met = np.array([one.message is not None for one in sent])
    return Outcome(
        score=np.where(met, marks.score, 0.0).tolist(),
        weight=marks.weight.tolist(),
        nll=marks.nll.tolist(),
        message_bytes=[None if one.message is None else len(one.message) for one in sent],
        request_bytes=[one.request_bytes for one in sent],
        smallest_bytes=[one.smallest_bytes for one in sent],
        kept=[one.kept for one in sent],
        encode_ms=[one.encode_ms for one in sent],
    )


def _marked(room: Room, sent: Sequence[Sent], rows: slice) -> Marks:
    """A batch in two parts: caches as far as they came, all else as text."""
    messages = [one.message for one in sent]
    is_cache = np.array([message is not None and not message.is_text for message in messages])
    if not is_cache.any():
        return room.exam.told(["" if one is None else one.text for one in messages], rows)
    caches = [message for message in messages if message is not None and not message.is_text]
    if is_cache.all():
        return room.exam.behind(room.road.arrived(caches), room.road.contract.stride, rows)
    alone = room.exam.told([""] * len(sent), rows)
    stand_in = iter(caches)
    filled = [next(stand_in) if held else caches[0] for held in is_cache]
    found = room.exam.behind(room.road.arrived(filled), room.road.contract.stride, rows)
    return _either(is_cache, found, alone)


def _either(first: np.ndarray, one: Marks, other: Marks) -> Marks:
    names = ("score", "weight", "nll")
    return Marks(*(np.where(first, getattr(one, name), getattr(other, name)) for name in names))
