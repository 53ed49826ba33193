"""The start of a frame: what it is, whom it is for, and a checksum of its own. Everything is little-endian.

The full form, 64 bytes, stands alone. In the short form, 24 bytes, a contract id stands for version and hashes, which
both sides know since hello. The layouts are normative in docs/format.md.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from kvferry.errors import (
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    Truncated,
    UnknownContract,
    UnsupportedVersion,
    UsageError,
)
from kvferry.wire.fields import (
    MAJOR,
    Agreement,
    FrameType,
    Header,
    MessageKind,
    TokenGrid,
    checksum,
    packed,
)
from kvferry.wire.limits import Limits

MAGIC = b"\x89KVW"
SHORT_MAGIC = b"\x89kvw"
_FULL = struct.Struct("<4sBBBBhHIIQQQQQ")
_SHORT = struct.Struct("<4sBBhIII")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FULL.size + _CHECKSUM.size
SHORT_HEADER_BYTES = _SHORT.size + _CHECKSUM.size
_P_FRAME, _RECEIVER_GRID, _SEALED = 1, 2, 4
_KINDS = frozenset(int(member) for member in MessageKind)


class Start(NamedTuple):
    """What stands at the start of a frame."""

    header: Header
    n_bytes: int
    sealed: bool


def header_bytes(view: memoryview) -> int:
    """The length of the header at the start of `view`: 64 or 24; `Malformed` for another magic, `Truncated`."""
    magic = bytes(view[: len(MAGIC)])
    if len(magic) == len(MAGIC) and magic not in (MAGIC, SHORT_MAGIC):
        what = f"the bytes begin with {magic.hex()}, a frame with {MAGIC.hex()} or {SHORT_MAGIC.hex()}"
        raise Malformed(what, cure="Give a KVWire frame")
    length = SHORT_HEADER_BYTES if magic == SHORT_MAGIC else HEADER_BYTES
    if len(view) < length:
        raise Truncated(f"{len(view)} bytes, a header has {length}", cure="Read the frame whole")
    return length


def write_header(header: Header, sealed: bool = False) -> bytes:
    """The 64 or 24 bytes of a header; `UsageError` for a field outside its range. `sealed`: END carries a MAC."""
    is_p = header.frame_type == FrameType.P
    distance = header.frame_id - header.reference_id if is_p else header.reference_id
    fault = _reference_fault(is_p, header.frame_id, distance, header.reference_hash)
    if fault or (is_p and header.short):
        cure = "Set reference_id and reference_hash in P frames alone, and write those with the full header"
        raise UsageError(fault or "a P frame has no short header", cure=cure)
    flags = is_p * _P_FRAME | (header.grid == TokenGrid.RECEIVER) * _RECEIVER_GRID | sealed * _SEALED
    if header.short:
        numbers = (header.step, header.agreement.contract_id, header.frame_id, header.n_tokens)
        fields = packed(_SHORT, SHORT_MAGIC, header.kind, flags, *numbers)
    else:
        numbers = (header.step, distance, header.frame_id, header.n_tokens, header.reference_hash)
        hashes = (header.model_hash, header.geometry_hash, header.tokenizer_hash, header.profile_hash)
        fields = packed(_FULL, MAGIC, MAJOR, header.minor, header.kind, flags, *numbers, *hashes)
    return fields + _CHECKSUM.pack(checksum(fields))


def read_header(view: memoryview, limits: Limits, agreements: Sequence[Agreement] = ()) -> Start:
    """The header at the start of `view`, or the error that says why there is none.

    Magic and version come before the checksum: another major version may place its checksum elsewhere. A short header
    of none of the `agreements` raises `UnknownContract`, everything else a `WireError`.
    """
    length = header_bytes(view)
    is_short = length == SHORT_HEADER_BYTES
    if not is_short:
        _check_major(view[len(MAGIC)])
    body = length - _CHECKSUM.size
    if checksum(view[:body]) != _CHECKSUM.unpack_from(view, body)[0]:
        raise ChecksumMismatch("the header was changed on the way", cure="Ask for the frame again")
    header, flags = _read_short(view, agreements) if is_short else _read_full(view)
    if header.n_tokens > limits.max_tokens:
        cure = "Send fewer tokens or raise Limits.max_tokens"
        raise LimitExceeded(f"{header.n_tokens} tokens, the limit is {limits.max_tokens}", cure=cure)
    return Start(header, length, bool(flags & _SEALED))


def _read_full(view: memoryview) -> tuple[Header, int]:
    _, _, minor, kind, flags, step, *numbers = _FULL.unpack_from(view)
    distance, frame_id, n_tokens, reference_hash, model, geometry, tokenizer, profile = numbers
    _check_kind_and_flags(kind, flags, _P_FRAME | _RECEIVER_GRID | _SEALED)
    is_p = bool(flags & _P_FRAME)
    fault = _reference_fault(is_p, frame_id, distance, reference_hash)
    if fault:
        raise Malformed(fault, cure="Write the frame with kvferry.wire.pack")
    header = Header(
        kind=MessageKind(kind),
        frame_type=FrameType(is_p),
        frame_id=frame_id,
        reference_id=frame_id - distance if is_p else 0,
        reference_hash=reference_hash,
        step=step,
        n_tokens=n_tokens,
        model_hash=model,
        geometry_hash=geometry,
        tokenizer_hash=tokenizer,
        profile_hash=profile,
        grid=_grid(flags),
        minor=minor,
    )
    return header, flags


def _read_short(view: memoryview, agreements: Sequence[Agreement]) -> tuple[Header, int]:
    _, kind, flags, step, contract_id, frame_id, n_tokens = _SHORT.unpack_from(view)
    _check_kind_and_flags(kind, flags, _RECEIVER_GRID | _SEALED)
    for agreed in agreements:
        if agreed.contract_id == contract_id:
            header = Header(
                MessageKind(kind),
                grid=_grid(flags),
                frame_id=frame_id,
                step=step,
                n_tokens=n_tokens,
                short=True,
                model_hash=agreed.model_hash,
                geometry_hash=agreed.geometry_hash,
                tokenizer_hash=agreed.tokenizer_hash,
                profile_hash=agreed.profile_hash,
                minor=agreed.minor,
            )
            return header, flags
    known = ", ".join(f"{agreed.contract_id:08x}" for agreed in agreements) or "none"
    cure = "Say hello first, or send the full header"
    raise UnknownContract(f"contract {contract_id:08x} is not one of this reader's: {known}", cure=cure)


def _grid(flags: int) -> TokenGrid:
    return TokenGrid.RECEIVER if flags & _RECEIVER_GRID else TokenGrid.SENDER


def _check_major(major: int) -> None:
    if major != MAJOR:
        cure = "Use a release of kvferry that writes and reads the same major version"
        raise UnsupportedVersion(f"format {major}, this reader knows {MAJOR}", cure=cure)


def _check_kind_and_flags(kind: int, flags: int, defined: int) -> None:
    cure = "Write the frame with kvferry.wire.pack"
    if kind not in _KINDS:
        raise Malformed(f"message kind {kind} does not exist", cure=cure)
    if flags & ~defined:
        raise Malformed(f"header flags {flags:#04x}, here only {defined:#04x} are defined", cure=cure)


def _reference_fault(is_p: bool, frame_id: int, distance: int, reference_hash: int) -> str | None:
    if is_p and not 1 <= distance <= min(frame_id, 0xFFFF):
        return f"P frame {frame_id} refers {distance} frames back, 1 to {min(frame_id, 0xFFFF)} may be"
    if not is_p and (distance or reference_hash):
        return f"an I frame refers to another one: {distance}, state {reference_hash:016x}"
    return None
