"""A message as datagrams, cut at the sender; reassembly.py puts them together. No socket and no clock here.

A datagram is 20 bytes and a piece of the message. Its priority is that of what it carries: 0 for what nothing can be
read without (header, segments other than PAYLOAD, END), 1 and up for PAYLOAD; no datagram mixes two. Pieces joined in
order of index are the message, which has its own checksums; repeating or dropping datagrams is left to the link.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from kvferry.errors import (
    ChecksumMismatch,
    Malformed,
    Truncated,
    UnsupportedVersion,
    UsageError,
)
from kvferry.wire.fields import MAJOR, checksum
from kvferry.wire.header import header_bytes
from kvferry.wire.limits import Limits
from kvferry.wire.segments import SegmentType, read_segment

DATAGRAM_MAGIC = b"\x89D"
_FIELDS = struct.Struct("<2sBBIII")
_CHECKSUM = struct.Struct("<I")
DATAGRAM_HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
MIN_DATAGRAM_BYTES = DATAGRAM_HEADER_BYTES + 1
_MAX_PRIORITY = 255


@dataclass(frozen=True)
class Datagram:
    """One piece of a message: the `index`-th of `count`."""

    message_id: int
    priority: int
    index: int
    count: int
    piece: bytes


def cut(
    message: bytes, max_bytes: int, message_id: int, priorities: Sequence[int] | None = None
) -> list[bytes]:
    """The datagrams of a packed frame, each of at most `max_bytes`, in order of the message.

    `priorities` gives each PAYLOAD segment one of 1 to 255; by default all have 1. A receiver takes one message of an
    id, so one MUST NOT come again within 1,024 messages. Raises `UsageError`, or a `WireError` for bytes that are no
    frame.

    >>> from kvferry.wire import pack, text_frame
    >>> message = pack(text_frame("tea in Oslo"))
    >>> tuple(len(datagram) for datagram in cut(message, 64, message_id=7))
    (64, 64, 30)
    """
    if max_bytes < MIN_DATAGRAM_BYTES:
        cure = f"Allow {MIN_DATAGRAM_BYTES} or more; 1,200 pass almost every network"
        raise UsageError(f"datagrams of {max_bytes} bytes", cure=cure)
    room = max_bytes - DATAGRAM_HEADER_BYTES
    pieces = [
        (priority, message[at : min(at + room, stop)])
        for priority, start, stop in _stretches(memoryview(message), priorities)
        for at in range(start, stop, room)
    ]
    return [
        _write(Datagram(message_id, priority, index, len(pieces), piece))
        for index, (priority, piece) in enumerate(pieces)
    ]


def read_datagram(data: bytes | bytearray | memoryview) -> Datagram:
    """The inverse of what `cut` does to one piece, or the `WireError` that says why it is none."""
    view = memoryview(data).cast("B")
    if len(view) < MIN_DATAGRAM_BYTES:
        cure = "Receive datagrams whole"
        raise Truncated(f"a datagram of {len(view)} bytes, {MIN_DATAGRAM_BYTES} is the least", cure=cure)
    magic, version, priority, message_id, index, count = _FIELDS.unpack_from(view)
    if magic != DATAGRAM_MAGIC:
        what = f"a datagram begins with {magic.hex()}, one of KVWire with {DATAGRAM_MAGIC.hex()}"
        raise Malformed(what, cure="Keep other traffic off this port")
    if version != MAJOR:
        cure = "Use a release of kvferry that writes and reads the same major version"
        raise UnsupportedVersion(f"datagrams of format {version}, this reader knows {MAJOR}", cure=cure)
    piece = view[DATAGRAM_HEADER_BYTES:]
    if checksum(view[: _FIELDS.size], piece) != _CHECKSUM.unpack_from(view, _FIELDS.size)[0]:
        raise ChecksumMismatch("a datagram was changed on the way", cure="Drop it and ask for it again")
    if index >= count:
        raise Malformed(f"datagram {index} of {count}", cure="Write datagrams with kvferry.wire.packets")
    return Datagram(message_id, priority, index, count, bytes(piece))


def _write(datagram: Datagram) -> bytes:
    numbers = datagram.message_id, datagram.index, datagram.count
    try:
        fields = _FIELDS.pack(DATAGRAM_MAGIC, MAJOR, datagram.priority, *numbers)
    except struct.error as error:
        cure = "Message ids take 32 bits, priorities 8"
        raise UsageError(f"a datagram's field is out of range in {numbers}: {error}", cure=cure) from None
    return fields + _CHECKSUM.pack(checksum(fields, datagram.piece)) + datagram.piece


def _stretches(view: memoryview, priorities: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    """Priority, start and end of each run of bytes of one priority."""
    ends = list(_ends(view))
    n_payload = sum(kind == SegmentType.PAYLOAD for kind, _ in ends)
    given = [1] * n_payload if priorities is None else list(priorities)
    if len(given) != n_payload or not all(1 <= priority <= _MAX_PRIORITY for priority in given):
        cure = f"Give each of {n_payload} PAYLOAD segments one of 1 to {_MAX_PRIORITY}"
        raise UsageError(f"priorities {given[:8]}", cure=cure)
    payload = iter(given)
    ranked = [(next(payload) if kind == SegmentType.PAYLOAD else 0, end) for kind, end in ends]
    start = 0
    for priority, run in groupby(ranked, key=lambda pair: pair[0]):
        stop = [end for _, end in run][-1]
        yield priority, start, stop
        start = stop


def _ends(view: memoryview) -> Iterator[tuple[int, int]]:
    """Type and end of each piece of a frame; the header counts as END's kin."""
    limits = Limits(max_bytes=len(view))
    offset = header_bytes(view)
    yield SegmentType.END, offset
    while offset < len(view):
        found = read_segment(view, offset, limits)
        if found is None:
            raise Truncated(
                f"a message of {len(view)} bytes ends inside a segment", cure="Cut whole messages"
            )
        offset = found[1]
        yield found[0].type, offset
