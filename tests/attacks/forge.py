"""Frames written field by field from docs/format.md, without the writer under test, so that any field can lie."""

import struct

import xxhash

HEADER = "<4sBBBBHhIIIQQQQ"
FIELDS = (
    "magic major minor kind frame_type flags step frame_id reference_id n_tokens "
    "model_hash geometry_hash tokenizer_hash profile_hash"
).split()
HONEST = dict(zip(FIELDS, (b"\x89KVW", 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), strict=True))


def low32(data: bytes) -> bytes:
    return struct.pack("<I", xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF)


def header(**fields: object) -> bytes:
    data = struct.pack(HEADER, *{**HONEST, **fields}.values())
    return data + low32(data)


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def segment(kind: int, body: bytes, flags: int = 1, length: bytes | None = None) -> bytes:
    start = bytes([kind, flags]) + (varint(len(body)) if length is None else length)
    return start + low32(start + body) + body


def closed(data: bytes, count: int) -> bytes:
    """`data` and the END that fits it."""
    return data + segment(255, varint(count) + struct.pack("<Q", xxhash.xxh3_64_intdigest(data)))


def frame(*segments: bytes, **fields: object) -> bytes:
    return closed(header(**fields) + b"".join(segments), len(segments))


TEXT = segment(32, b"hi")
"""A segment that a text frame may hold."""
