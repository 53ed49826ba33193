"""A frame: header, segments in order of type, END. Bytes in, `Frame` out; no socket, clock or tensor here.

One content has one byte string: `pack(unpack(b)) == b` and `unpack(pack(f)) == f`, in either form of the header.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from kvferry.errors import ChecksumMismatch, LimitExceeded, Malformed, NotAuthentic, Truncated, UsageError
from kvferry.wire.fields import Agreement, Header
from kvferry.wire.header import HEADER_BYTES, read_header, write_header
from kvferry.wire.limits import DEFAULT_LIMITS, Limits
from kvferry.wire.seal import MAC_BYTES, check_key, check_mac, mac, require_seal
from kvferry.wire.segments import ANCILLARY, Segment, SegmentType, read_segment, segment_bytes, write_segment
from kvferry.wire.varint import read_varint, write_varint

_DIGEST = struct.Struct("<Q")


@dataclass(frozen=True)
class Frame(Header):
    """One message: the fields of the header and what it carries.

    Segments are put in order of type, stable for equal types. `skipped` are ancillary segments of unknown type: they
    are not used, but kept, so that the frame can be written again unchanged.
    """

    segments: tuple[Segment, ...] = ()
    skipped: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", _in_order(self.segments))
        object.__setattr__(self, "skipped", _in_order(self.skipped))

    def bodies(self, kind: SegmentType) -> list[bytes]:
        """The bodies of all segments of one type, in order."""
        return [segment.body for segment in self.segments if segment.type == kind]

    def body(self, kind: SegmentType) -> bytes | None:
        """The body of the only segment of a type, None if there is none; `Malformed` if there are more."""
        found = self.bodies(kind)
        if len(found) > 1:
            raise Malformed(f"{len(found)} segments {kind.name}, at most one may be", cure="Send one")
        return found[0] if found else None


@dataclass(frozen=True)
class Prefix:
    """The whole segments at the start of a frame that may have been cut.

    `n_bytes_used` is where they stop; `missing` says in words what did not come, None if nothing did.
    """

    frame: Frame
    n_bytes_used: int
    missing: str | None


def pack(frame: Frame, key: bytes | None = None) -> bytes:
    """The bytes of a frame, sealed if there is a key; `UsageError` for a field outside its range.

    >>> from kvferry.wire import MessageKind
    >>> frame = Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT, b"hi"),))
    >>> len(pack(frame)), unpack(pack(frame)) == frame
    (89, True)
    """
    parts = [write_header(frame, sealed=key is not None)]
    ordered = _in_order((*frame.segments, *frame.skipped))
    for segment in ordered:
        _check_writable(segment, segment in frame.skipped)
        parts += write_segment(segment)
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    end = write_varint(len(ordered)) + _DIGEST.pack(digest.intdigest())
    if key is not None:
        check_key(key)
        end += mac(key, parts)
    return b"".join([*parts, *write_segment(Segment(SegmentType.END, end))])


def packed_bytes(lengths: Iterable[int], header_bytes: int = HEADER_BYTES, mac_bytes: int = 0) -> int:
    """`len(pack(frame))` for segments whose bodies have these lengths, by default with the full header and no seal.

    >>> from kvferry.wire import SHORT_HEADER_BYTES
    >>> packed_bytes([2]), packed_bytes([2], SHORT_HEADER_BYTES), packed_bytes([2], mac_bytes=MAC_BYTES)
    (89, 49, 105)
    """
    sizes = [segment_bytes(length) for length in lengths]
    end = len(write_varint(len(sizes))) + _DIGEST.size + mac_bytes
    return header_bytes + sum(sizes) + segment_bytes(end)


def unpack(
    data: bytes | bytearray | memoryview,
    limits: Limits = DEFAULT_LIMITS,
    agreements: Sequence[Agreement] = (),
    key: bytes | None = None,
) -> Frame:
    """The frame that `data` is, to the last byte, or the `WireError` that says why it is none.

    `agreements` are the contracts that a short header may name (`UnknownContract` for another one). With a `key` only
    frames sealed with it are read, without one only those that are not: `NotAuthentic`.
    """
    prefix = _walk(data, limits, agreements, key)
    if prefix.missing:
        raise Truncated(f"{len(data)} bytes and no END: {prefix.missing}", cure="Read the frame whole")
    return prefix.frame


def unpack_prefix(
    data: bytes | bytearray | memoryview,
    limits: Limits = DEFAULT_LIMITS,
    agreements: Sequence[Agreement] = (),
    key: bytes | None = None,
) -> Prefix:
    """The whole segments of a frame whose tail may be missing; never half a segment.

    The header must be there whole (`Truncated` otherwise). Without END nothing vouches for the number of segments,
    but each one that is returned passed its own checksum. A seal covers a frame whole, so with a `key` a cut one raises
    `NotAuthentic`.
    """
    prefix = _walk(data, limits, agreements, key)
    if prefix.missing and key is not None:
        cure = "Wait for the whole frame: its seal covers all of it"
        raise NotAuthentic(f"the frame is cut, {prefix.missing}", cure=cure)
    return prefix


def _walk(
    data: bytes | bytearray | memoryview,
    limits: Limits,
    agreements: Sequence[Agreement],
    key: bytes | None,
) -> Prefix:
    view = memoryview(data).cast("B")
    _check_at_most(len(view), limits.max_bytes, "bytes", "max_bytes")
    header, offset, sealed = read_header(view, limits, agreements)
    require_seal(sealed, key)
    segments: list[Segment] = []
    missing = None
    while missing is None:
        found = read_segment(view, offset, limits)
        if found is None:
            missing = f"the bytes from {offset} on hold {len(view) - offset} of an unfinished segment"
        elif found[0].type == SegmentType.END:
            _check_end(found[0].body, view[:offset], len(segments), key)
            _check_no_tail(found[1], len(view))
            return Prefix(_frame(header, segments), found[1], None)
        else:
            segments.append(found[0])
            _check_at_most(len(segments), limits.max_segments, "segments", "max_segments")
            _check_order(segments)
            offset = found[1]
    return Prefix(_frame(header, segments), offset, missing)


def _frame(header: Header, segments: list[Segment]) -> Frame:
    known = tuple(segment for segment in segments if segment.known)
    skipped = tuple(segment for segment in segments if not segment.known)
    return Frame(**header.__dict__, segments=known, skipped=skipped)


def _in_order(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(sorted(segments, key=lambda segment: segment.type))


def _check_writable(segment: Segment, skipped: bool) -> None:
    critical = not skipped and segment.type not in ANCILLARY
    if segment.type == SegmentType.END or segment.known == skipped or segment.critical != critical:
        what = f"segment type {segment.type} with critical={segment.critical} in {'skipped' if skipped else 'segments'}"
        raise UsageError(
            what, cure="Put known types but END into segments, unknown ancillary ones into skipped"
        )


def _check_at_most(value: int, limit: int, unit: str, name: str) -> None:
    if value > limit:
        cure = f"Send less at once or raise Limits.{name}"
        raise LimitExceeded(f"{value} {unit}, the limit is {limit}", cure=cure)


def _check_order(segments: list[Segment]) -> None:
    before, last = segments[-2:] if len(segments) > 1 else (segments[0], segments[0])
    if last.type < before.type:
        what = f"segment type {last.type} comes after {before.type}"
        raise Malformed(what, cure="Write segments in order of type")


def _check_end(body: bytes, covered: memoryview, n_segments: int, key: bytes | None) -> None:
    count = read_varint(memoryview(body), 0)
    mac_bytes = 0 if key is None else MAC_BYTES
    if count is None or len(body) != count[1] + _DIGEST.size + mac_bytes:
        cure = f"Write a count, a digest of {_DIGEST.size} bytes and a MAC of {mac_bytes}"
        raise Malformed(f"END has {len(body)} bytes", cure=cure)
    if count[0] != n_segments:
        raise Malformed(f"END counts {count[0]} segments, {n_segments} came", cure="Ask for the frame again")
    if _DIGEST.unpack_from(body, count[1])[0] != xxhash.xxh3_64_intdigest(covered):
        raise ChecksumMismatch("the frame was changed on the way", cure="Ask for the frame again")
    if key is not None:
        check_mac(body[-MAC_BYTES:], key, covered)


def _check_no_tail(end: int, length: int) -> None:
    if length != end:
        raise Malformed(
            f"{length - end} bytes follow END at byte {end}", cure="Give one frame and nothing else"
        )
