"""What is in a message, without the model that made it, and without torch: `kvferry inspect`.

Damaged or cut bytes are surveyed up to their last whole segment; the error that stopped the reader is part of it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kvferry.codec.extent import read_shape, read_tokens
from kvferry.errors import KvferryError, LimitExceeded, WireError
from kvferry.session.message import text_of
from kvferry.wire import (
    DEFAULT_LIMITS,
    MAJOR,
    Agreement,
    Frame,
    Limits,
    MessageKind,
    Segment,
    SegmentType,
    read_json,
    unpack,
)
from kvferry.wire.fields import STEPS_PER_OCTAVE
from kvferry.wire.header import Header, Start, read_header
from kvferry.wire.segments import read_segment

MAX_LAYERS, MAX_SLOTS = 4096, 1 << 26
"""Layers, and layers times tokens, that are counted: no message can make the survey take more memory."""
_CHECKSUM_BYTES, _CONTRACT_AT = 4, 8
_HASHES = ("model", "geometry", "tokenizer", "profile")


@dataclass(frozen=True)
class HeaderRow:
    """The header, in words. `step_size` is 2**(step/64). A short header has a `contract` id instead of hashes."""

    n_bytes: int
    version: str
    kind: str
    frame_type: str
    grid: str
    frame_id: int
    reference_id: int
    reference_hash: str
    tokens: int
    step: int
    step_size: float
    sealed: bool
    contract: str | None
    hashes: dict[str, str] | None


@dataclass(frozen=True)
class SegmentRow:
    """One segment: `offset` and `n_bytes` are those of the whole segment, `share` is of the message."""

    type: int
    name: str
    critical: bool
    offset: int
    n_bytes: int
    body_bytes: int
    share: float
    checksum: str


@dataclass(frozen=True)
class LayerRow:
    """A run of equal layers that hold equally many tokens."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    tokens: int


@dataclass(frozen=True)
class CacheRow:
    """What a KV message unfolds to. `bits_per_element` counts all bytes of a whole message; None for a damaged one."""

    codec: str
    keys: str
    call_length: int
    layers: tuple[LayerRow, ...]
    numbers: int
    bits_per_element: float | None


@dataclass(frozen=True)
class Problem:
    """The error that the reader met."""

    type: str
    what: str
    cure: str


@dataclass(frozen=True)
class Survey:
    """A message in words and numbers. `n_bytes_whole`: how far it could be read; parts that are not there are None."""

    n_bytes: int
    n_bytes_whole: int
    header: HeaderRow | None
    segments: tuple[SegmentRow, ...]
    cache: CacheRow | None
    text: str | None
    json: dict[str, Any] | None
    error: Problem | None


def survey(
    data: bytes, key: bytes | None = None, limits: Limits = DEFAULT_LIMITS
) -> tuple[Survey, KvferryError | None]:
    """The survey of a message, and the error that it reports, if there is one. `key` opens the seal of a sealed one."""
    anybody = (_AtItsWord(named=_contract_id(data)),)
    error = _error(data, limits, anybody, key)
    try:
        start = read_header(memoryview(data), limits, anybody)
    except KvferryError:
        return Survey(len(data), 0, None, (), None, None, None, _problem(error)), error
    parts = _parts(data, start.n_bytes, limits)
    frame = _frame(start.header, [part for _, part, _ in parts])
    try:
        cache = _cache(frame, 0 if error else len(data)) if frame.kind == MessageKind.KV else None
        text = text_of(frame, limits) if frame.kind == MessageKind.TEXT and frame.segments else None
        content = read_json(frame, limits) if frame.bodies(SegmentType.JSON) else None
    except KvferryError as found:
        cache, text, content, error = None, None, None, error or found
    rows = tuple(_row(data, *part) for part in parts)
    whole = parts[-1][2] if parts else start.n_bytes
    return Survey(len(data), whole, _header(data, start), rows, cache, text, content, _problem(error)), error


@dataclass(frozen=True)
class _AtItsWord(Agreement):
    """An agreement that whatever a short header names fits: here it is shown, not used."""

    named: int = 0

    @property
    def contract_id(self) -> int:
        return self.named


def _error(
    data: bytes, limits: Limits, anybody: Sequence[Agreement], key: bytes | None
) -> KvferryError | None:
    try:
        unpack(data, limits, anybody, key)
    except KvferryError as error:
        return error
    return None


def _contract_id(data: bytes) -> int:
    """What stands there in a short header; any number in another one."""
    return int.from_bytes(data[_CONTRACT_AT : _CONTRACT_AT + 4], "little")


def _parts(data: bytes, offset: int, limits: Limits) -> list[tuple[int, Segment, int]]:
    """Begin, segment and end of everything that can be read, up to END, damage or cut."""
    view, parts = memoryview(data), []
    with suppress(WireError):
        while not (parts and parts[-1][1].type == SegmentType.END):
            found = read_segment(view, offset, limits)
            if found is None:
                break
            parts.append((offset, *found))
            offset = found[1]
    return parts


def _frame(header: Header, segments: list[Segment]) -> Frame:
    known = tuple(segment for segment in segments if segment.known and segment.type != SegmentType.END)
    return Frame(**header.__dict__, segments=known)


def _header(data: bytes, start: Start) -> HeaderRow:
    header = start.header
    hashes = {name: f"{getattr(header, f'{name}_hash'):016x}" for name in _HASHES}
    return HeaderRow(
        n_bytes=start.n_bytes,
        version=f"{MAJOR}.{header.minor}",
        kind=header.kind.name,
        frame_type=header.frame_type.name,
        grid=header.grid.name.lower(),
        frame_id=header.frame_id,
        reference_id=header.reference_id,
        reference_hash=f"{header.reference_hash:016x}",
        tokens=header.n_tokens,
        step=header.step,
        step_size=2 ** (header.step / STEPS_PER_OCTAVE),
        sealed=start.sealed,
        contract=f"{_contract_id(data):08x}" if header.short else None,
        hashes=None if header.short else hashes,
    )


def _row(data: bytes, offset: int, segment: Segment, end: int) -> SegmentRow:
    body = end - len(segment.body)
    return SegmentRow(
        type=segment.type,
        name=SegmentType(segment.type).name if segment.known else "unknown",
        critical=segment.critical,
        offset=offset,
        n_bytes=end - offset,
        body_bytes=len(segment.body),
        share=(end - offset) / len(data),
        checksum=f"{int.from_bytes(data[body - _CHECKSUM_BYTES : body], 'little'):08x}",
    )


def _cache(frame: Frame, n_bytes: int) -> CacheRow:
    """Shape and size of the cache; `Malformed` where SPEC, SHAPE or TOKENS cannot be read."""
    runs, keys, call_length = read_shape(frame.body(SegmentType.SHAPE) or b"")
    n_layers = sum(run[0] for run in runs)
    if n_layers > MAX_LAYERS or n_layers * frame.n_tokens > MAX_SLOTS:
        what = (
            f"{n_layers} layers of {frame.n_tokens} tokens, the limits are {MAX_LAYERS} and {MAX_SLOTS} slots"
        )
        raise LimitExceeded(what, cure="Unpack it where its model is known")
    present = read_tokens(frame.body(SegmentType.TOKENS), n_layers, frame.n_tokens)
    rows = _layer_rows([run[1:] for run in runs for _ in range(run[0])], present.sum(axis=1).tolist())
    numbers = sum(row.layers * row.tokens * row.heads * (row.key_dim + row.value_dim) for row in rows)
    bits = 8 * n_bytes / numbers if n_bytes and numbers else None
    spec = (frame.body(SegmentType.SPEC) or b"").decode("ascii", "backslashreplace")
    return CacheRow(spec, keys, call_length, rows, numbers, bits)


def _layer_rows(shapes: list[tuple[int, int, int]], tokens: list[int]) -> tuple[LayerRow, ...]:
    runs = groupby(zip(shapes, tokens, strict=True))
    return tuple(LayerRow(len(list(run)), *shape, n) for (shape, n), run in runs)


def _problem(error: KvferryError | None) -> Problem | None:
    return Problem(type(error).__name__, error.what, error.cure) if error else None
