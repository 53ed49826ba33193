"""The first 60 bytes of a frame: what it is, whom it is for, and a checksum of their own.

Everything is little-endian. The layout is normative in docs/format.md.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from kvferry.errors import (
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    Truncated,
    UnsupportedVersion,
    UsageError,
)
from kvferry.wire.limits import Limits

MAGIC = b"\x89KVW"
MAJOR, MINOR = 0, 1
_FIELDS = struct.Struct("<4sBBBBHhIIIQQQQ")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


class MessageKind(IntEnum):
    """What a frame is there for."""

    KV = 1
    TEXT = 2
    HELLO = 3
    REQUEST = 4
    REPORT = 5
    RESET = 6
    ERROR = 7


class FrameType(IntEnum):
    """I stands alone; P needs the frame that `reference_id` names."""

    I = 0  # noqa: E741 (the letter of video coding)
    P = 1


class TokenGrid(IntEnum):
    """Whose tokens the slots stand for."""

    SENDER = 0
    RECEIVER = 1


_KINDS = frozenset(int(member) for member in MessageKind)
_TYPES = frozenset(int(member) for member in FrameType)
_GRIDS = frozenset(int(member) for member in TokenGrid)


@dataclass(frozen=True)
class Header:
    """The fields of the header. Hashes are the first 64 bits of the fingerprints; 0 means none."""

    kind: MessageKind
    frame_type: FrameType = FrameType.I
    frame_id: int = 0
    reference_id: int = 0
    step: int = 0
    """Quantiser step of the frame, i of 2**(i/64); 0 where the codec has none."""
    n_tokens: int = 0
    model_hash: int = 0
    geometry_hash: int = 0
    tokenizer_hash: int = 0
    profile_hash: int = 0
    grid: TokenGrid = TokenGrid.SENDER


def checksum(*parts: bytes | memoryview) -> int:
    """The low 32 bits of XXH3-64 over the parts joined.

    >>> checksum(b"ab", b"c") == checksum(b"abc")
    True
    """
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest() & 0xFFFFFFFF


def write_header(header: Header) -> bytes:
    """The 60 bytes of a header; `UsageError` for a field outside its range."""
    if header.frame_type == FrameType.I and header.reference_id:
        raise UsageError(
            f"an I frame refers to frame {header.reference_id}", cure="Set reference_id to 0 or make it P"
        )
    try:
        fields = _FIELDS.pack(
            MAGIC, MAJOR, MINOR, header.kind, header.frame_type, header.grid, *_numbers(header)
        )
    except struct.error as error:
        cure = "Ids and n_tokens take 32 bits, hashes 64, step 16 signed"
        raise UsageError(f"a header field is out of range in {header}: {error}", cure=cure) from None
    return fields + _CHECKSUM.pack(checksum(fields))


def _numbers(header: Header) -> tuple[int, ...]:
    hashes = (header.model_hash, header.geometry_hash, header.tokenizer_hash, header.profile_hash)
    return header.step, header.frame_id, header.reference_id, header.n_tokens, *hashes


def read_header(view: memoryview, limits: Limits) -> Header:
    """The header at the start of `view`, or the `WireError` that says why there is none.

    Magic and version come before the checksum: a newer major version may place its checksum elsewhere.
    """
    if len(view) < HEADER_BYTES:
        raise Truncated(f"{len(view)} bytes, a header has {HEADER_BYTES}", cure="Read the frame whole")
    magic, major, minor, kind, frame_type, flags, *numbers = _FIELDS.unpack_from(view)
    _check_version(magic, major, minor)
    if checksum(view[: _FIELDS.size]) != _CHECKSUM.unpack_from(view, _FIELDS.size)[0]:
        raise ChecksumMismatch("the header was changed on the way", cure="Ask for the frame again")
    step, frame_id, reference_id, n_tokens, *hashes = numbers
    _check_fields(kind, frame_type, flags, reference_id)
    if n_tokens > limits.max_tokens:
        cure = "Send fewer tokens or raise Limits.max_tokens"
        raise LimitExceeded(f"{n_tokens} tokens, the limit is {limits.max_tokens}", cure=cure)
    return Header(
        MessageKind(kind),
        FrameType(frame_type),
        frame_id,
        reference_id,
        step,
        n_tokens,
        *hashes,
        grid=TokenGrid(flags),
    )


def _check_version(magic: bytes, major: int, minor: int) -> None:
    if magic != MAGIC:
        raise Malformed(
            f"the bytes begin with {magic.hex()}, a frame with {MAGIC.hex()}", cure="Give a KVWire frame"
        )
    # Major 0 promises nothing between its minors, so there only the own one is read.
    if (major, minor) != (MAJOR, MINOR):
        cure = "Use the same release of kvferry on both sides"
        raise UnsupportedVersion(f"format {major}.{minor}, this reader knows {MAJOR}.{MINOR}", cure=cure)


def _check_fields(kind: int, frame_type: int, flags: int, reference_id: int) -> None:
    cure = "Write the frame with kvferry.wire.pack"
    if kind not in _KINDS or frame_type not in _TYPES:
        raise Malformed(f"message kind {kind} or frame type {frame_type} does not exist", cure=cure)
    if flags not in _GRIDS:
        raise Malformed(f"header flags {flags:#06x}: only bit 0, the grid, is defined", cure=cure)
    if frame_type == FrameType.I and reference_id:
        raise Malformed(f"an I frame refers to frame {reference_id}", cure=cure)
