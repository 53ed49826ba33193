"""A batch of caches through a codec and back, and what it cost to the bit."""

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.codec import CODECS, Codec, decode
from kvferry.kv import KV, stack
from kvferry.lab.wire.subject import Subject
from kvferry.wire import pack, unpack


@dataclass(frozen=True)
class Coded:
    """What came out at the other end, and the bits of all messages together."""

    kv: KV
    n_bits: float


Coding = Callable[[Subject], Coded]


def through_codec(spec: str) -> Coding:
    """One of our codecs: every message packed, unpacked and decoded; the bits are those of `len(message)`."""
    codec = CODECS.parse(spec)

    def run(subject: Subject) -> Coded:
        messages = [message_of(codec, kv) for kv in subject.content.sequences()]
        decoded = stack([decode(unpack(message), subject.content.geometry) for message in messages])
        return Coded(decoded, 8.0 * sum(map(len, messages)))

    return run


def message_of(codec: Codec, kv: KV) -> bytes:
    """The bytes of one cache."""
    return pack(codec.encode(kv))
