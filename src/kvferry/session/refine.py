"""Answering from the first part of a message, and asking for more of it where the answer is a close call.

    sender                                           receiver
    REQUEST (question, patience, whole length)  ->
    the first bytes of a message                ->
                                                <-   REQUEST (offset, bytes)   } as long as the answer's margin
    the bytes that follow                       ->                             } is too small, and rounds are left
                                                <-   REPORT (reply, rounds, margins)

What is sent is one packed message, piece by piece: nothing is coded again, and the receiver joins what came. Rule 1:
the stop rule is fixed before the first byte, so that it cannot be bent to an answer. Rule 2: the sender ends a piece
with a whole segment, where one fits. Rule 3: every byte of both directions is the meter's, requests too.
"""

import asyncio
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvferry.errors import LimitExceeded, Malformed, UsageError
from kvferry.link import Channel
from kvferry.models.generate import generate
from kvferry.session.message import Message, message_of
from kvferry.session.receiver import Receiver
from kvferry.session.reply import Reply
from kvferry.wire import Agreement, Frame, MessageKind, json_frame, read_json, unpack_prefix

MOST_BYTES = 1 << 30
"""Of one message: what a stranger may make a receiver hold."""
MOST_ROUNDS = 16


@dataclass(frozen=True)
class Patience:
    """When an answer is good enough: its smallest margin, in nats, or after `max_rounds` requests of `more_bytes`.

    >>> Patience(margin=1.0, more_bytes=2000)
    Patience(margin=1.0, more_bytes=2000, max_rounds=2)
    """

    margin: float
    more_bytes: int
    max_rounds: int = 2

    def __post_init__(self) -> None:
        known = isinstance(self.margin, int | float) and self.margin >= 0
        known &= all(type(n) is int for n in (self.more_bytes, self.max_rounds))
        if not known or not 1 <= self.more_bytes <= MOST_BYTES or not 0 <= self.max_rounds <= MOST_ROUNDS:
            cure = f"margin >= 0, more_bytes 1 to {MOST_BYTES}, max_rounds 0 to {MOST_ROUNDS}"
            raise UsageError(f"{self} is out of range", cure=cure)

    def asks(self, margin: float, rounds: int) -> bool:
        """Whether an answer of this margin, after some rounds, asks for more."""
        return margin < self.margin and rounds < self.max_rounds


@dataclass(frozen=True)
class Asked:
    """The REQUEST that announces a message in pieces. `n_bytes`: its length without END."""

    question: str
    max_new_tokens: int
    patience: Patience
    n_bytes: int

    def message(self) -> Message:
        content = {
            "questions": [self.question],
            "max_new_tokens": self.max_new_tokens,
            "n_bytes": self.n_bytes,
            "patience": asdict(self.patience),
        }
        return message_of(json_frame(MessageKind.REQUEST, content))


@dataclass(frozen=True)
class Scored:
    """A reply and the smallest margin along it, in nats."""

    reply: Reply
    margin: float


def answer_so_far(
    receiver: Receiver, frames: list[Frame], questions: list[str], *, max_new_tokens: int = 32
) -> list[Scored]:
    """Answer from frames of which the end may be missing; raises what `Receiver.answer_batch` does."""
    state, logits, watch = receiver.take_in(frames, questions)
    with watch.stage("generate"), torch.no_grad():
        answers = generate(state, logits, max_new_tokens=max_new_tokens, stop=receiver.model.prompt.stop)
    stages = watch.shared_by(len(answers))
    return [Scored(Reply(one.text.strip(), one.ended_by, stages), one.margin) for one in answers]


async def refined(receiver: Receiver, channel: Channel, asked: Asked) -> Message:
    """The receiver's half of one question: the REPORT. Raises what stands in the way of an answer."""
    margins, rounds = list[float](), 0
    data = await channel.receive("message")
    while True:
        _check_length(data, asked)
        scored = await asyncio.to_thread(_answer, receiver, data, asked)
        margins.append(scored.margin)
        if not asked.patience.asks(scored.margin, rounds) or len(data) >= asked.n_bytes:
            break
        wanted = min(asked.patience.more_bytes, asked.n_bytes - len(data))
        await channel.send(more_message(len(data), wanted).data, "request")
        more = await channel.receive("message")
        if not 0 < len(more) <= wanted:
            raise Malformed(f"{len(more)} bytes came, {wanted} were asked for", cure="Send what is asked for")
        data, rounds = data + more, rounds + 1
    content = {"replies": [asdict(scored.reply)], "rounds": rounds, "margins": margins}
    return message_of(json_frame(MessageKind.REPORT, content))


def more_message(offset: int, n_bytes: int) -> Message:
    """The receiver's REQUEST for the bytes that follow."""
    return message_of(json_frame(MessageKind.REQUEST, {"offset": offset, "n_bytes": n_bytes}))


def piece(data: bytes, offset: int, n_bytes: int, agreements: tuple[Agreement, ...] = ()) -> bytes:
    """The bytes of a message from `offset` on, up to the last segment that ends within `n_bytes`, or all of them."""
    used = unpack_prefix(data[: offset + n_bytes], agreements=agreements).n_bytes_used
    return data[offset : used if used > offset else offset + n_bytes]


def read_asked(content: dict[str, Any], questions: list[str], max_new_tokens: int) -> Asked:
    """The inverse of `Asked.message`; `Malformed` for anything else."""
    n_bytes, said = content.get("n_bytes"), content.get("patience")
    if type(n_bytes) is not int or not isinstance(said, dict) or len(questions) != 1:
        what = "REQUEST with patience, and without n_bytes or with several questions"
        raise Malformed(what, cure="Send what ask_refining sends")
    if not 0 < n_bytes <= MOST_BYTES:
        raise LimitExceeded(f"a message of {n_bytes} bytes", cure=f"Send at most {MOST_BYTES}")
    try:
        patience = Patience(**said)
    except (TypeError, UsageError) as error:
        raise Malformed(f"patience {str(said)[:80]}: {error}", cure="Send what ask_refining sends") from None
    return Asked(questions[0], max_new_tokens, patience, n_bytes)


def read_more(frame: Frame) -> tuple[int, int]:
    """Offset and bytes wanted; `Malformed` for another request."""
    content = read_json(frame)
    offset, n_bytes = content.get("offset"), content.get("n_bytes")
    if type(offset) is not int or type(n_bytes) is not int or min(offset, n_bytes) < 1:
        raise Malformed("a REQUEST without offset and n_bytes", cure="Use kvferry on both sides")
    return offset, n_bytes


def _answer(receiver: Receiver, data: bytes, asked: Asked) -> Scored:
    frame = unpack_prefix(data, agreements=receiver.agreements).frame
    (scored,) = answer_so_far(receiver, [frame], [asked.question], max_new_tokens=asked.max_new_tokens)
    return scored


def _check_length(data: bytes, asked: Asked) -> None:
    if len(data) > asked.n_bytes:
        what = f"{len(data)} bytes of a message of {asked.n_bytes}"
        raise LimitExceeded(what, cure="Announce its length without END")
