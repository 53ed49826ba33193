"""The talk between a sender and a receiver over a channel.

    sender                                receiver
    HELLO                           ->
                                    <-    HELLO (accepted) or ERROR, which ends the talk
    REQUEST (n questions)           ->                                      } any number
    message 1 ... message n         ->                                      } of times
                                    <-    REPORT (n replies) or ERROR       }

Rule 1: hello comes first. Rule 2: a request announces its messages, so every request has exactly one answer, whatever
became of the messages. Rule 3: a message that must be refused takes its request with it and nothing else: receiver and
connection stay up.
Rule 4: a request that cannot be read, or is too large, ends the talk: nobody knows what would follow it.
Rule 5: the receiver's HELLO lists the contracts it accepts; requests and messages under one of them come with the short
header.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from kvferry.errors import (
    ContractError,
    KvferryError,
    LimitExceeded,
    LinkError,
    Malformed,
    PeerLost,
    PeerRefused,
    UsageError,
    WireError,
)
from kvferry.link import Channel, Listener, connect, listen
from kvferry.session.message import Message, message_of
from kvferry.session.receiver import Receiver
from kvferry.session.refine import Asked, read_asked, refined
from kvferry.session.reply import Reply
from kvferry.wire import Agreement, Frame, MessageKind, json_frame, read_json

_logger = logging.getLogger(__name__)

MAX_MESSAGES = 256
"""In one request: four of the batches that saturate two cores."""
MAX_REQUEST_BYTES = 1 << 30
"""Of all messages of one request together: what a stranger may make a receiver hold."""
MAX_NEW_TOKENS = 4096
ANSWER_TIMEOUT_S = 600.0
"""The longest silence: a large batch on a slow machine computes for minutes."""
T = TypeVar("T")


class Remote:
    """A receiver at the other end of a channel, after hello."""

    def __init__(
        self,
        channel: Channel,
        codecs: Sequence[str],
        contracts: Sequence[int] = (),
        refines: bool = False,
    ) -> None:
        self.channel = channel
        self.meter = channel.meter
        self.codecs = tuple(codecs)
        """What the receiver's aligner was fitted under; empty where any codec will do."""
        self.contracts = frozenset(contracts)
        """Ids of what short headers may stand for."""
        self.refines = refines
        """Whether it answers from the first part of a message, see `refine.py`."""

    def agreed(self, message: Message) -> Message:
        """The message as it travels, short where the receiver has agreed. Damaged ones are the receiver's to refuse."""
        try:
            return message.agreed(self.contracts)
        except (WireError, ContractError):
            return message

    async def ask(
        self, messages: Sequence[Message], questions: Sequence[str], *, max_new_tokens: int = 32
    ) -> list[Reply]:
        """Send one question and one message for each reply; `PeerRefused` with the receiver's own reason."""
        if len(messages) != len(questions):
            what = f"{len(messages)} messages and {len(questions)} questions"
            raise UsageError(what, cure="Give one question to each message")
        content = {"questions": list(questions), "max_new_tokens": max_new_tokens}
        request = message_of(json_frame(MessageKind.REQUEST, content))
        await self.channel.send(self.agreed(request).data, "request")
        for message in messages:
            await self.channel.send(self.agreed(message).data, "message")
        frame = await expect(self.channel, (MessageKind.REPORT,), "answer")
        return read_replies(frame, len(questions))

    async def close(self) -> None:
        await self.channel.close()


async def greet(channel: Channel, hello: Message) -> Remote:
    """Say hello over a channel; `PeerRefused` where the receiver does not accept the contract."""
    await channel.send(hello.data, "hello")
    answer = read_json(await expect(channel, (MessageKind.HELLO,), "hello"))
    codecs, contracts = _listed(answer, "codecs", str), _listed(answer, "contracts", int)
    return Remote(channel, codecs, contracts, answer.get("refines") is True)


async def call(host: str, port: int, hello: Message, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Remote:
    """Connect to a receiver by TCP and say hello. `timeout_s` is the longest silence while it computes."""
    channel = await connect(host, port, timeout_s=timeout_s)
    try:
        return await greet(channel, hello)
    except BaseException:
        await channel.close()
        raise


async def serve(receiver: Receiver, host: str, port: int, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Listener:
    """Answer senders by TCP until the listener is closed."""

    async def handle(channel: Channel) -> None:
        await converse(receiver, channel)

    return await listen(host, port, handle, timeout_s=timeout_s)


async def converse(receiver: Receiver, channel: Channel) -> None:
    """The receiver's half of one conversation, until the sender leaves."""
    greeting = await channel.receive("hello")
    accepted = await _answer(channel, lambda: receiver.welcome(Message(greeting)), "hello")
    while accepted:
        try:
            request = await channel.receive("request")
        except PeerLost:
            return
        accepted = await _serve_request(receiver, channel, Message(request, receiver.agreements))


async def _serve_request(receiver: Receiver, channel: Channel, request: Message) -> bool:
    """Whether the conversation can go on."""
    try:
        questions, max_new_tokens = _read_request(request)
        content = read_json(request.frame)
        if "patience" in content:
            return await _refine(receiver, channel, read_asked(content, questions, max_new_tokens))
        messages = await _receive_messages(channel, len(questions), receiver.agreements)
    except (WireError, ContractError) as error:
        await channel.send(_refusal(error).data, "answer")
        return False

    def report() -> Message:
        replies = receiver.answer_batch(messages, questions, max_new_tokens=max_new_tokens)
        return message_of(json_frame(MessageKind.REPORT, {"replies": [asdict(reply) for reply in replies]}))

    await _answer(channel, report, "answer")
    return True


async def _refine(receiver: Receiver, channel: Channel, asked: Asked) -> bool:
    """The sender waits after every piece, so a refusal leaves both in step."""
    try:
        answer = await refined(receiver, channel, asked)
    except LinkError:
        raise
    except KvferryError as error:
        answer = _refusal(error)
    await channel.send(answer.data, "answer")
    return True


async def _receive_messages(channel: Channel, n: int, agreements: tuple[Agreement, ...]) -> list[Message]:
    messages: list[Message] = []
    n_bytes = 0
    for _ in range(n):
        message = Message(await channel.receive("message"), agreements)
        n_bytes += len(message)
        if n_bytes > MAX_REQUEST_BYTES:
            cure = "Ask in several requests"
            raise LimitExceeded(
                f"{n_bytes} bytes in one request, the limit is {MAX_REQUEST_BYTES}", cure=cure
            )
        messages.append(message)
    return messages


async def _answer(channel: Channel, make: Callable[[], Message], kind: str) -> bool:
    """Send what `make` gives, or the refusal it raises. The model works in a thread: other senders stay served."""
    try:
        answer, accepted = await asyncio.to_thread(make), True
    except KvferryError as error:
        answer, accepted = _refusal(error), False
    except Exception as error:  # out of memory, say: the other side must not wait in vain
        _logger.exception("answering failed")
        failure = KvferryError(f"the receiver failed: {type(error).__name__}", cure="See the receiver's log")
        answer, accepted = _refusal(failure), False
    await channel.send(answer.data, kind)
    return accepted


def _refusal(error: KvferryError) -> Message:
    content = {"error": type(error).__name__, "what": error.what, "cure": error.cure}
    return message_of(json_frame(MessageKind.ERROR, content))


def _read_request(message: Message) -> tuple[list[str], int]:
    if message.frame.kind != MessageKind.REQUEST:
        raise ContractError(
            f"a {message.frame.kind.name} came instead of REQUEST", cure="Announce messages by a REQUEST"
        )
    content = read_json(message.frame)
    questions, n_new = content.get("questions"), content.get("max_new_tokens")
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise Malformed("REQUEST without a list of questions", cure="Send what Remote.ask sends")
    if not 1 <= len(questions) <= MAX_MESSAGES:
        cure = f"Ask 1 to {MAX_MESSAGES} at once"
        raise LimitExceeded(
            f"{len(questions)} questions in one request, the limit is {MAX_MESSAGES}", cure=cure
        )
    if not isinstance(n_new, int) or not 1 <= n_new <= MAX_NEW_TOKENS:
        cure = f"Ask for 1 to {MAX_NEW_TOKENS}"
        raise LimitExceeded(f"max_new_tokens is {n_new!r}, the limit is {MAX_NEW_TOKENS}", cure=cure)
    return questions, n_new


async def expect(channel: Channel, kinds: Sequence[MessageKind], label: str) -> Frame:
    """The next frame, of one of these kinds; `PeerRefused` for an ERROR."""
    frame = Message(await channel.receive(label)).frame
    if frame.kind == MessageKind.ERROR:
        content = read_json(frame)
        raise PeerRefused(f"{content.get('error')}: {content.get('what')}", cure=str(content.get("cure")))
    if frame.kind not in kinds:
        raise ContractError(
            f"{frame.kind.name} came where {kinds[-1].name} belongs", cure="Use kvferry on both sides"
        )
    return frame


def _listed(answer: dict[str, Any], name: str, kind: type[T]) -> list[T]:
    """A list that the receiver's HELLO may leave out."""
    found = answer.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise Malformed(f"HELLO lists {name} {str(found)[:80]}", cure=f"Send a list of {kind.__name__}")
    return found


def read_replies(frame: Frame, n: int) -> list[Reply]:
    """The replies of a REPORT."""
    rows: Any = read_json(frame).get("replies")
    if not isinstance(rows, list) or len(rows) != n:
        raise Malformed(f"REPORT without {n} replies", cure="Use kvferry on both sides")
    return [_read_reply(row) for row in rows]


def _read_reply(row: Any) -> Reply:
    try:
        return Reply(
            str(row["text"]), str(row["ended_by"]), {k: float(v) for k, v in row["stages_ms"].items()}
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Malformed(
            "a reply without text, ended_by or stages_ms", cure="Use kvferry on both sides"
        ) from None
