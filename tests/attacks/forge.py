"""Frames written field by field from docs/format.md, without the writer under test, so that any field can lie."""

import hashlib
import struct

import xxhash

FULL = "<4sBBBBhHIIQQQQQ"
FIELDS = (
    "magic major minor kind flags step distance frame_id n_tokens "
    "reference_hash model_hash geometry_hash tokenizer_hash profile_hash"
).split()
HONEST = dict(zip(FIELDS, (b"\x89KVW", 1, 0, 2, *10 * [0]), strict=True))
SHORT = "<4sBBhIII"
SHORT_FIELDS = "magic kind flags step contract_id frame_id n_tokens".split()
SHORT_HONEST = dict(zip(SHORT_FIELDS, (b"\x89kvw", 2, *5 * [0]), strict=True))


def low32(data: bytes) -> bytes:
    return struct.pack("<I", xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF)


def header(**fields: object) -> bytes:
    data = struct.pack(FULL, *{**HONEST, **fields}.values())
    return data + low32(data)


def contract_id(minor: int = 0, *hashes: int) -> int:
    data = struct.pack("<BBQQQQ", 1, minor, *(*hashes, 0, 0, 0, 0)[:4])
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def short_header(**fields: object) -> bytes:
    data = struct.pack(SHORT, *{**SHORT_HONEST, "contract_id": contract_id(), **fields}.values())
    return data + low32(data)


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def segment(kind: int, body: bytes, flags: int = 1, length: bytes | None = None) -> bytes:
    start = bytes([kind, flags]) + (varint(len(body)) if length is None else length)
    return start + low32(start + body) + body


def closed(data: bytes, count: int, mac: bytes = b"") -> bytes:
    """`data` and the END that fits it."""
    return data + segment(255, varint(count) + struct.pack("<Q", xxhash.xxh3_64_intdigest(data)) + mac)


def frame(*segments: bytes, **fields: object) -> bytes:
    return closed(header(**fields) + b"".join(segments), len(segments))


def short_frame(*segments: bytes, **fields: object) -> bytes:
    return closed(short_header(**fields) + b"".join(segments), len(segments))


def sealed_frame(*segments: bytes, key: bytes, **fields: object) -> bytes:
    data = header(**{"flags": 4, **fields}) + b"".join(segments)
    return closed(
        data, len(segments), hashlib.blake2b(data, digest_size=16, key=key, person=b"KVWire 1").digest()
    )


TEXT = segment(32, b"hi")
"""A segment that a text frame may hold."""
