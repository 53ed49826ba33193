"""One arm against a running receiver: send, ask, score, count bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvferry.lab.arms import Arm, Reading
from kvferry.lab.items import Batch, right
from kvferry.lab.peer import Peer
from kvferry.metrics.paired import Interval, wilson
from kvferry.session.exchange import call
from kvferry.session.message import Message
from kvferry.session.reply import Reply
from kvferry.session.sender import Sender

MAX_NEW_TOKENS = 12
"""An answer is one word; a receiver that knows nothing may go on."""


@dataclass(frozen=True)
class Outcome:
    """The answers of one arm, in the order of the items, and mean bytes per item."""

    texts: tuple[str, ...]
    message_bytes: float
    link_bytes: float


async def run_arm(peer: Peer, sender: Sender, arm: Arm, readings: Sequence[Reading]) -> Outcome:
    """One conversation: hello, then a request for each batch. The link's bytes are those of the whole conversation."""
    remote = await call(peer.host, peer.port, sender.hello())
    replies: list[Reply] = []
    messages: list[Message] = []
    try:
        for reading in readings:
            packed = [remote.agreed(message) for message in arm.pack(sender, reading)]
            replies += await remote.ask(packed, reading.batch.questions, max_new_tokens=MAX_NEW_TOKENS)
            messages += packed
    finally:
        await remote.close()
    n = len(replies)
    return Outcome(
        tuple(reply.text for reply in replies), sum(map(len, messages)) / n, remote.meter.total_bytes / n
    )


def run_alone(sender: Sender, batches: Sequence[Batch]) -> Outcome:
    """The sender answers what it has read itself; nothing is sent."""
    replies = [
        reply
        for batch in batches
        for reply in sender.answer_batch(batch.contexts, batch.questions, max_new_tokens=MAX_NEW_TOKENS)
    ]
    return Outcome(tuple(reply.text for reply in replies), 0.0, 0.0)


@dataclass(frozen=True)
class Score:
    """Which items are right for their own world, and which follow the world that the message tells of."""

    own: NDArray[np.int64]
    payload: NDArray[np.int64] | None

    @classmethod
    def of(cls, outcome: Outcome, batches: Sequence[Batch], world: str | None) -> "Score":
        own = right(outcome.texts, [answer for batch in batches for answer in batch.answers])
        if world == "twin":
            return cls(
                own, right(outcome.texts, [answer for batch in batches for answer in batch.twins.answers])
            )
        return cls(own, None if world is None else own)

    def metrics(self) -> dict[str, float | None]:
        return {
            "accuracy": float(self.own.mean()),
            "follows_payload": None if self.payload is None else float(self.payload.mean()),
        }

    def ci95(self) -> dict[str, Interval | None]:
        return {"accuracy": _interval(self.own), "follows_payload": _interval(self.payload)}


def _interval(hits: NDArray[np.int64] | None) -> Interval | None:
    return None if hits is None else wilson(int(hits.sum()), len(hits))
