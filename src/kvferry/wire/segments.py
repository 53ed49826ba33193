"""A segment is `[type u8, flags u8, length varint, checksum u32, body]` and says itself where it stops.

Rule 1: a reader returns a whole segment, or raises one `WireError`, or returns None for "the bytes end inside it".
Rule 2: the length is checked against the limits before anything is allocated or waited for.
Rule 3: type and criticality of a known segment belong together; there is one way to write it.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from kvferry.errors import ChecksumMismatch, LimitExceeded, Malformed, UnknownSegment
from kvferry.wire.fields import checksum
from kvferry.wire.limits import Limits
from kvferry.wire.varint import read_varint, write_varint

_CRITICAL = 1
_CHECKSUM = struct.Struct("<I")


class SegmentType(IntEnum):
    """The known segments, in the order in which a frame holds them."""

    SPEC = 1
    SHAPE = 2
    TOKENS = 3
    POSITIONS = 4
    ROLES = 5
    SPANS = 6
    CLASSES = 7
    WEIGHTS = 8
    OVERLAPS = 9
    PAYLOAD = 16
    TEXT = 32
    JSON = 33
    TEXT_ZSTD = 34
    END = 255


ANCILLARY = frozenset({SegmentType.SPANS})
"""A reader may ignore these; whatever else it does not know it must refuse."""
_KNOWN = frozenset(int(member) for member in SegmentType)


@dataclass(frozen=True)
class Segment:
    """One piece of a frame. `critical`: a reader that does not know the type must refuse the frame."""

    type: int
    body: bytes
    critical: bool = True

    @property
    def known(self) -> bool:
        return self.type in _KNOWN


def segment_bytes(length: int) -> int:
    """Bytes on the wire of a segment whose body has `length`.

    >>> segment_bytes(0), segment_bytes(200)
    (7, 208)
    """
    return 2 + len(write_varint(length)) + _CHECKSUM.size + length


def write_segment(segment: Segment) -> tuple[bytes, bytes]:
    """Head and body, to be joined once for the whole frame."""
    start = bytes([segment.type, _CRITICAL if segment.critical else 0]) + write_varint(len(segment.body))
    return start + _CHECKSUM.pack(checksum(start, segment.body)), segment.body


def read_segment(view: memoryview, offset: int, limits: Limits) -> tuple[Segment, int] | None:
    """The segment at `offset` and the offset behind it; None if the bytes end inside it."""
    found = read_varint(view, offset + 2)
    if found is None:
        return None
    length, start = found[0], found[1] + _CHECKSUM.size
    if length > limits.max_bytes:
        cure = "Send less at once or raise Limits.max_bytes"
        raise LimitExceeded(f"a segment of {length} bytes, the limit is {limits.max_bytes}", cure=cure)
    if start + length > len(view):
        return None
    body = view[start : start + length]
    if checksum(view[offset : found[1]], body) != _CHECKSUM.unpack_from(view, found[1])[0]:
        raise ChecksumMismatch(
            f"the segment at byte {offset} was changed on the way", cure="Ask for the frame again"
        )
    return _checked(view[offset], view[offset + 1], body), start + length


def _checked(kind: int, flags: int, body: memoryview) -> Segment:
    critical = bool(flags & _CRITICAL)
    if flags & ~_CRITICAL:
        raise Malformed(
            f"flags {flags:#04x} of segment {kind}: only bit 0 is defined", cure="Set the others to 0"
        )
    if kind not in _KNOWN and critical:
        known = ", ".join(member.name for member in SegmentType)
        raise UnknownSegment(
            f"critical segment {kind} is not one of {known}", cure="Use a newer kvferry here"
        )
    if kind in _KNOWN and critical != (kind not in ANCILLARY):
        name = SegmentType(kind).name
        raise Malformed(
            f"segment {name} has critical={critical}", cure=f"{name} must have critical={not critical}"
        )
    return Segment(kind, bytes(body), critical)
