"""Changes behind the checksums: a frame is taken apart, changed inside, and closed again as it should be."""

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import zstandard

from attacks import forge
from fuzz.mutate import NUMBERS, mutated, varint
from fuzz.seeds import Seed, seeds
from kvferry.codec import CODECS
from kvferry.wire import SegmentType, unpack

_TYPES = (*(int(member) for member in SegmentType), 0, 9, 64, 99, 254)
_WIDTHS = dict(zip(forge.FIELDS, (0, 8, 8, 8, 8, 16, 16, 32, 32, 64, 64, 64, 64, 64), strict=True))
_SHORT_WIDTHS = dict(zip(forge.SHORT_FIELDS, (0, 8, 8, 16, 32, 32, 32), strict=True))


@dataclass(frozen=True)
class Parts:
    """A frame as fields and `(type, flags, body)`."""

    fields: dict[str, int | bytes]
    segments: tuple[tuple[int, int, bytes], ...]
    short: bool
    key: bytes | None


@cache
def parts_of(seed: Seed) -> Parts:
    frame = unpack(seed.data, agreements=seed.agreements, key=seed.key)
    layout, names = (forge.SHORT, forge.SHORT_FIELDS) if frame.short else (forge.FULL, forge.FIELDS)
    fields = dict(zip(names, struct.unpack_from(layout, seed.data), strict=True))
    segments = tuple((s.type, int(s.critical), s.body) for s in frame.segments)
    return Parts(fields, segments, frame.short, seed.key)


def written(parts: Parts) -> bytes:
    """The frame, with every checksum right."""
    body = b"".join(forge.segment(kind % 256, body, flags % 256) for kind, flags, body in parts.segments)
    data = (forge.short_header if parts.short else forge.header)(**parts.fields) + body
    mac = (
        hashlib.blake2b(data, digest_size=16, key=parts.key, person=b"KVWire 1").digest()
        if parts.key
        else b""
    )
    return forge.closed(data, len(parts.segments), mac)


def restructured(random: Random, seed: Seed) -> bytes:
    """One to three changes inside."""
    parts = parts_of(seed)
    for _ in range(random.choice((1, 1, 2, 3))):
        parts = random.choices(_CHANGES, _WEIGHTS)[0](random, parts)
    return written(parts)


def _header(random: Random, parts: Parts) -> Parts:
    widths = _SHORT_WIDTHS if parts.short else _WIDTHS
    name = random.choice([name for name, width in widths.items() if width])
    old, width = int(parts.fields[name]), widths[name]
    value = random.choice((old + 1, old - 1, old ^ 1 << random.randrange(width), random.choice(NUMBERS)))
    value %= 1 << width
    signed = value - (1 << width) if name == "step" and value >> width - 1 else value
    return replace(parts, fields={**parts.fields, name: signed})


def _body(random: Random, parts: Parts) -> Parts:
    return _changed(random, parts, lambda body: mutated(random, body, [body, *_bodies()]))


def _numbers(random: Random, parts: Parts) -> Parts:
    """A body read as varints, one of them changed."""

    def change(body: bytes) -> bytes:
        numbers = _read_varints(body[:4096])
        if not numbers:
            return body + varint(random.choice(NUMBERS[:-1]))
        at, old = random.randrange(len(numbers)), numbers[random.randrange(len(numbers))]
        near = random.choice((old + 1, max(old - 1, 0), 2 * old, random.choice(NUMBERS[:-1])))
        numbers[at : at + random.choice((0, 1, 1, 1))] = random.choice(([near], [near], [], [near, near]))
        return b"".join(varint(number) for number in numbers)

    return _changed(random, parts, change, below=SegmentType.PAYLOAD)


def _spec(random: Random, parts: Parts) -> Parts:
    """Another codec, or another option."""
    if not parts.segments or parts.segments[0][0] != SegmentType.SPEC:
        return _body(random, parts)

    def change(body: bytes) -> bytes:
        if random.random() < 0.4:
            return random.choice(_specs())
        number = str(random.choice((*NUMBERS, 3, 4, 8, -1, 0.5))).encode()
        return re.sub(rb"\d+", lambda found: number if random.random() < 0.5 else found[0], body)

    kind, flags, body = parts.segments[0]
    return replace(parts, segments=((kind, flags, change(body)), *parts.segments[1:]))


def _inside_zstd(random: Random, parts: Parts) -> Parts:
    """What a zstd frame holds is changed, and compressed again."""

    def change(body: bytes) -> bytes:
        try:
            plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=1 << 16)
        except zstandard.ZstdError:
            return mutated(random, body, [body])
        return zstandard.ZstdCompressor(1).compress(mutated(random, plain, [plain]))

    return _changed(random, parts, change)


def _segments(random: Random, parts: Parts) -> Parts:
    """Segments lost, doubled, exchanged, relabelled, or taken from another frame."""
    found = list(parts.segments)
    at = random.randrange(len(found) + 1)
    match random.randrange(6):
        case 0:
            del found[at : at + 1]
        case 1:
            found[at:at] = found[at : at + 1]
        case 2:
            random.shuffle(found)
        case 3:
            found[at : at + random.choice((0, 1))] = [random.choice(_other_segments())]
        case 4 if at < len(found):
            found[at] = (random.choice(_TYPES), found[at][1], found[at][2])
        case 5 if at < len(found):
            found[at] = (found[at][0], random.choice((0, 1, 2, 3, 255)), found[at][2])
    if random.random() < 0.7:
        found.sort(key=lambda segment: segment[0])
    return replace(parts, segments=tuple(found))


def _changed(random: Random, parts: Parts, change, below: int = 256) -> Parts:
    """One segment of a type below `below` with another body."""
    where = [at for at, segment in enumerate(parts.segments) if segment[0] < below]
    if not where:
        return parts
    at = random.choice(where)
    kind, flags, body = parts.segments[at]
    return replace(
        parts, segments=(*parts.segments[:at], (kind, flags, change(body)), *parts.segments[at + 1 :])
    )


def _read_varints(body: bytes) -> list[int]:
    numbers, value, shift = [], 0, 0
    for byte in body:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value % (1 << 63))
            value, shift = 0, 0
    return numbers


@cache
def _other_segments() -> Sequence[tuple[int, int, bytes]]:
    return [segment for seed in seeds() for segment in parts_of(seed).segments]


@cache
def _bodies() -> Sequence[bytes]:
    return sorted({body for _, _, body in _other_segments()})


@cache
def _specs() -> Sequence[bytes]:
    found = {body for kind, _, body in _other_segments() if kind == SegmentType.SPEC}
    return sorted(
        {*found, *(name.encode() for name in CODECS.names()), b"os", b"int", b"raw()", b"int(bits=4"}
    )


_CHANGES = (_header, _body, _numbers, _spec, _inside_zstd, _segments)
_WEIGHTS = (2, 4, 5, 2, 1, 3)
