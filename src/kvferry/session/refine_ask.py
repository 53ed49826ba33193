"""The sender's half of `refine.py`: a question, the first part of a message, and what the receiver asks for."""

import time
from dataclasses import dataclass

from kvferry.codec import codec_of
from kvferry.errors import BudgetTooSmall, CodecNotCovered, Malformed, PeerRefused
from kvferry.session.exchange import Remote, expect, read_replies
from kvferry.session.message import Message
from kvferry.session.refine import Asked, Patience, piece, read_more
from kvferry.session.reply import Reply
from kvferry.wire import SHORT_HEADER_BYTES, MessageKind, SegmentType, packed_bytes, read_json, unpack_prefix
from kvferry.wire.header import HEADER_BYTES

CODEC = "progressive"


@dataclass(frozen=True)
class Refined:
    """A reply, and what it took: bytes by direction, requests among them, and the time from question to reply."""

    reply: Reply
    rounds: int
    margins: tuple[float, ...]
    """The smallest margin of the answer after each round."""
    n_bytes_sent: int
    n_bytes_received: int
    latency_ms: float


async def ask_refining(
    remote: Remote,
    message: Message,
    question: str,
    patience: Patience,
    first_bytes: int,
    *,
    max_new_tokens: int = 32,
) -> Refined:
    """Ask a question and send about `first_bytes` of a `progressive` message, then what the receiver asks for.

    Raises `CodecNotCovered` for another codec, `PeerRefused` where the receiver does not refine, or with its reason.
    """
    if not remote.refines:
        raise PeerRefused("the receiver does not refine", cure="Send whole messages: Remote.ask")
    if codec_of(message.frame).name != CODEC:
        raise CodecNotCovered(f"a message of {codec_of(message.frame)!r}", cure=f"Refine messages of {CODEC}")
    start, before = time.perf_counter(), (remote.meter.sent.total(), remote.meter.received.total())
    short = remote.agreed(message)
    data = short.data[: unpack_prefix(short.data[:-1], agreements=short.agreements).n_bytes_used]
    _check_first(data, first_bytes, short)
    asked = Asked(question, max_new_tokens, patience, len(data))
    await remote.channel.send(remote.agreed(asked.message()).data, "request")
    await remote.channel.send(piece(data, 0, first_bytes, short.agreements), "message")
    frame = await expect(remote.channel, (MessageKind.REQUEST, MessageKind.REPORT), "answer")
    while frame.kind == MessageKind.REQUEST:
        offset, n_bytes = read_more(frame)
        if offset + n_bytes > len(data):
            raise Malformed(f"bytes up to {offset + n_bytes} of {len(data)} are wanted", cure="Ask for less")
        await remote.channel.send(piece(data, offset, n_bytes, short.agreements), "message")
        frame = await expect(remote.channel, (MessageKind.REQUEST, MessageKind.REPORT), "answer")
    (reply,) = read_replies(frame, 1)
    content = read_json(frame)
    return Refined(
        reply,
        int(content["rounds"]),
        tuple(map(float, content["margins"])),
        remote.meter.sent.total() - before[0],
        remote.meter.received.total() - before[1],
        (time.perf_counter() - start) * 1e3,
    )


def _check_first(data: bytes, first_bytes: int, message: Message) -> None:
    """Without a chunk there is nothing to answer from."""
    if unpack_prefix(data[:first_bytes], agreements=message.agreements).frame.bodies(SegmentType.PAYLOAD):
        return
    frame = message.frame
    kinds = [segment.type for segment in frame.segments]
    upto = frame.segments[: kinds.index(SegmentType.PAYLOAD) + 1]
    least = packed_bytes([len(one.body) for one in upto]) - packed_bytes([])
    raise BudgetTooSmall(first_bytes, least + (SHORT_HEADER_BYTES if frame.short else HEADER_BYTES))
