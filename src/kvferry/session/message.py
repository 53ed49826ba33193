"""The bytes of one frame, the only thing whose size is ever reported."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import zstandard

from kvferry.errors import LimitExceeded, Malformed
from kvferry.link import Meter, read_message, write_message
from kvferry.wire import (
    DEFAULT_LIMITS,
    Agreement,
    Frame,
    FrameType,
    Limits,
    MessageKind,
    Segment,
    SegmentType,
    pack,
    read_text,
    text_frame,
    unpack,
)

ZSTD_LEVEL = 19
_NOTHING = zstandard.ZstdCompressor(ZSTD_LEVEL).compress(b"")


@dataclass(frozen=True)
class Message:
    """One packed frame.

    >>> message = text_message("The ring is in the barn.")
    >>> message.text, len(message) == len(message.data)
    ('The ring is in the barn.', True)
    """

    data: bytes
    agreements: tuple[Agreement, ...] = field(default=(), repr=False, compare=False)
    """What a short header may stand for."""

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def frame(self) -> Frame:
        """The frame inside; a `WireError` for bytes that hold none, `UnknownContract` for a strange short header."""
        return unpack(self.data, agreements=self.agreements)

    def agreed(self, contracts: Collection[int]) -> "Message":
        """This message for a receiver that has agreed to these contract ids: with the short header if it can have one.

        >>> message = text_message("The ring is in the barn.")
        >>> len(message) - len(message.agreed([message.frame.agreement.contract_id]))
        40
        """
        known = self.frame.frame_type == FrameType.I and self.frame.agreement.contract_id in contracts
        if known == self.frame.short:
            return self
        return Message(pack(replace(self.frame, short=known)), (self.frame.agreement,))

    @property
    def is_text(self) -> bool:
        return self.frame.kind == MessageKind.TEXT

    @cached_property
    def text(self) -> str:
        """The text of a text message, decompressed within the wire's limits."""
        return text_of(self.frame)

    def save(self, path: str | Path) -> None:
        """Write the message to a file, beside its place and then there."""
        write_message(Path(path), self.data, Meter())

    @classmethod
    def load(cls, path: str | Path) -> "Message":
        return cls(read_message(Path(path), Meter()))


def message_of(frame: Frame) -> Message:
    """Pack a frame."""
    return Message(pack(frame))


def text_message(text: str, *, compress: bool = False) -> Message:
    """The baseline: the text itself, as UTF-8 or as one zstd frame of it."""
    if not compress:
        return message_of(text_frame(text))
    body = zstandard.ZstdCompressor(ZSTD_LEVEL).compress(text.encode())
    return message_of(Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT_ZSTD, body),)))


def text_of(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> str:
    """The text of a text frame, decompressed within the limits; `Malformed`, `LimitExceeded`."""
    packed = frame.body(SegmentType.TEXT_ZSTD)
    if packed is None:
        return read_text(frame)
    if len(frame.segments) > 1:
        raise Malformed(
            f"{len(frame.segments)} segments in a frame of packed text", cure="Send the text once"
        )
    return _decompress(packed, limits)


def _decompress(packed: bytes, limits: Limits) -> str:
    try:
        n_bytes = zstandard.frame_content_size(packed)
        if n_bytes < 0:
            raise Malformed("the packed text does not state its size", cure="Send one zstd frame that does")
        if n_bytes > limits.max_bytes:
            cure = "Send less text or raise Limits.max_bytes"
            raise LimitExceeded(
                f"the text unpacks to {n_bytes} bytes, the limit is {limits.max_bytes}", cure=cure
            )
        if n_bytes == 0 and packed != _NOTHING:  # the library looks no further than the stated size
            raise Malformed("the packed text states 0 bytes and holds some", cure="State its size")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False).decode()
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise Malformed(
            f"the packed text cannot be read: {error}", cure="Send one zstd frame of UTF-8"
        ) from None
