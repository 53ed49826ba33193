"""Bytes that must be refused: the one right error each, never garbage, never much memory."""

import random
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import xxhash

import contract
from attacks import forge
from kvferry.codec import CODECS, codec_of, decode
from kvferry.codec.manifest import kv_frame, spans_segment
from kvferry.errors import (
    ChecksumMismatch,
    CodecNotCovered,
    ForeignProfile,
    KvferryError,
    LimitExceeded,
    Malformed,
    NotAuthentic,
    Truncated,
    UnknownContract,
    UnknownSegment,
    UnsupportedVersion,
    WireError,
)
from kvferry.kv import Plan
from kvferry.wire import (
    Agreement,
    FrameType,
    Limits,
    MessageKind,
    Segment,
    SegmentType,
    json_frame,
    pack,
    text_frame,
    unpack,
    unpack_prefix,
)

KEY = bytes(range(32))
OTHER_MODEL = Agreement(model_hash=1)
KV_CACHE = contract.cache(((1, 3, 2), (2, 1, 1)), n_tokens=5)
HOLES = Plan.everything(KV_CACHE)
HOLES.classes[1, :, 2:4] = 0
KV_FRAME = CODECS.parse("int(4)").encode(KV_CACHE, HOLES)
HONEST = {
    "text": pack(text_frame("hi")),
    "hello": pack(json_frame(MessageKind.HELLO, {"grid": "sender"})),
    "kv": pack(KV_FRAME),
    "short": pack(replace(KV_FRAME, short=True)),
    "sealed": pack(KV_FRAME, KEY),
}
SEALED = 4


def read(data, how=unpack):
    """As a receiver would that has agreed to the contract and holds the key where one was used."""
    sealed = data[:4] == b"\x89KVW" and data[7:8] == bytes([SEALED])
    return how(data, agreements=(KV_FRAME.agreement,), key=KEY if sealed else None)


every_frame = pytest.mark.parametrize("data", HONEST.values(), ids=HONEST)


@every_frame
def test_cut_at_every_byte(data):
    for cut in range(len(data)):
        with pytest.raises(Truncated):
            read(data[:cut])


@every_frame
def test_every_bit_flipped(data):
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            read(bad)


@every_frame
def test_bytes_behind_the_end(data):
    for tail in (b"\0", data):
        with pytest.raises(Malformed, match="follow END"):
            read(data + tail)
        with pytest.raises(Malformed, match="follow END"):
            read(data + tail, unpack_prefix)


@every_frame
def test_a_byte_left_out_or_doubled(data):
    for at in range(len(data)):
        for bad in (data[:at] + data[at + 1 :], data[: at + 1] + data[at:]):
            with pytest.raises(WireError):
                read(bad)


HEADERS = {
    "magic": ({"magic": b"PK\3\4"}, Malformed),
    "major 0": ({"major": 0}, UnsupportedVersion),
    "next major": ({"major": 2}, UnsupportedVersion),
    "last major": ({"major": 255, "minor": 255}, UnsupportedVersion),
    "kind 0": ({"kind": 0}, Malformed),
    "kind 8": ({"kind": 8}, Malformed),
    "kind 255": ({"kind": 255}, Malformed),
    "fourth flag": ({"flags": 8}, Malformed),
    "highest flag": ({"flags": 0x80}, Malformed),
    "sealed without a seal": ({"flags": 4}, NotAuthentic),
    "I with a distance": ({"distance": 1}, Malformed),
    "I with a distance to frame 0": ({"distance": 1, "frame_id": 1}, Malformed),
    "I with a reference state": ({"reference_hash": 1}, Malformed),
    "P without a distance": ({"flags": 1, "frame_id": 9}, Malformed),
    "P before the first frame": ({"flags": 1, "frame_id": 9, "distance": 10}, Malformed),
    "4 G tokens": ({"n_tokens": 2**32 - 1}, LimitExceeded),
}


@pytest.mark.parametrize(("fields", "error"), HEADERS.values(), ids=HEADERS)
def test_header(fields, error):
    with pytest.raises(error):
        unpack(forge.frame(forge.TEXT, **fields))
    with pytest.raises(error):
        unpack_prefix(forge.frame(forge.TEXT, **fields))


SHORT_HEADERS = {
    "magic": ({"magic": b"\x89kvW"}, Malformed),
    "kind 0": ({"kind": 0}, Malformed),
    "kind 255": ({"kind": 255}, Malformed),
    "P": ({"flags": 1}, Malformed),
    "fourth flag": ({"flags": 8}, Malformed),
    "highest flag": ({"flags": 0x80}, Malformed),
    "sealed without a seal": ({"flags": 4}, NotAuthentic),
    "another contract": ({"contract_id": forge.contract_id(0, 1)}, UnknownContract),
    "contract 0": ({"contract_id": 0}, UnknownContract),
    "last contract": ({"contract_id": 2**32 - 1}, UnknownContract),
    "4 G tokens": ({"n_tokens": 2**32 - 1}, LimitExceeded),
}


@pytest.mark.parametrize(("fields", "error"), SHORT_HEADERS.values(), ids=SHORT_HEADERS)
def test_short_header(fields, error):
    for how in (unpack, unpack_prefix):
        assert how(forge.short_frame(forge.TEXT), agreements=(Agreement(),))
        with pytest.raises(error):
            how(forge.short_frame(forge.TEXT, **fields), agreements=(Agreement(),))


LARGEST = {"frame_id": 2**32 - 1, "step": 2**15 - 1, "minor": 255} | {
    f"{name}_hash": 2**64 - 1 for name in ("model", "geometry", "tokenizer", "profile")
}


@pytest.mark.parametrize("field", LARGEST)
def test_header_fields_that_may_be_anything(field):
    data = forge.frame(forge.TEXT, **{field: LARGEST[field]})
    assert getattr(unpack(data), field) == LARGEST[field]
    assert pack(unpack(data)) == data


@pytest.mark.parametrize("field", ["frame_id", "step"])
def test_short_header_fields_that_may_be_anything(field):
    data = forge.short_frame(forge.TEXT, **{field: LARGEST[field]})
    frame = unpack(data, agreements=(OTHER_MODEL, Agreement()))
    assert getattr(frame, field) == LARGEST[field]
    assert pack(frame) == data


@pytest.mark.parametrize(("frame_id", "distance"), [(1, 1), (2**32 - 1, 1), (2**32 - 1, 2**16 - 1)])
def test_a_p_frame_refers_back(frame_id, distance):
    data = forge.frame(forge.TEXT, flags=1, frame_id=frame_id, distance=distance, reference_hash=2**64 - 1)
    frame = unpack(data)
    assert (frame.frame_type, frame.reference_id) == (FrameType.P, frame_id - distance)
    assert frame.reference_hash == 2**64 - 1
    assert pack(frame) == data


BITS = {"B": 8, "h": 16, "H": 16, "I": 32, "Q": 64}


def _extremes(layout: str, names: list[str]):
    """Every field but the magic at its ends and beside them."""
    for name, code in zip(names[1:], layout[3:], strict=True):
        low = -(2**15) if code == "h" else 0
        high = low + 2 ** BITS[code] - 1
        yield from ((name, value) for value in (low, low + 1, high - 1, high))


@pytest.mark.parametrize("is_p", [0, 1])
def test_every_header_field_at_its_extremes(is_p):
    """What is read is written again unchanged, and the rest is refused by name."""
    for name, value in _extremes(forge.FULL, forge.FIELDS):
        honest = {"flags": is_p, "frame_id": 9 * is_p, "distance": is_p}
        _written_again_or_refused(forge.frame(forge.TEXT, **{**honest, name: value}))
    for name, value in _extremes(forge.SHORT, forge.SHORT_FIELDS):
        _written_again_or_refused(forge.short_frame(forge.TEXT, **{"flags": is_p, name: value}))


def _written_again_or_refused(data: bytes) -> None:
    for key in (None, KEY):
        with suppress(KvferryError):
            assert pack(unpack(data, agreements=(Agreement(),), key=key), key) == data


SEALS = {
    "none": (forge.frame(forge.TEXT), NotAuthentic),
    "of another key": (forge.sealed_frame(forge.TEXT, key=bytes(32)), NotAuthentic),
    "no flag": (forge.sealed_frame(forge.TEXT, key=KEY, flags=0), NotAuthentic),
    "no MAC": (forge.frame(forge.TEXT, flags=SEALED), Malformed),
    "MAC of zeros": (forge.closed(forge.header(flags=SEALED) + forge.TEXT, 1, bytes(16)), NotAuthentic),
    "MAC of 15 bytes": (forge.closed(forge.header(flags=SEALED) + forge.TEXT, 1, bytes(15)), Malformed),
    "MAC of 17 bytes": (forge.closed(forge.header(flags=SEALED) + forge.TEXT, 1, bytes(17)), Malformed),
    "MAC of another frame": (
        forge.closed(
            forge.header(flags=SEALED) + forge.segment(32, b"ho"),
            1,
            forge.sealed_frame(forge.TEXT, key=KEY)[-16:],
        ),
        NotAuthentic,
    ),
    "MAC of the frame without its last segment": (
        forge.closed(
            forge.header(flags=SEALED) + forge.TEXT + forge.TEXT,
            2,
            forge.sealed_frame(forge.TEXT, key=KEY)[-16:],
        ),
        NotAuthentic,
    ),
}


@pytest.mark.parametrize(("data", "error"), SEALS.values(), ids=SEALS)
def test_seal(data, error):
    for how in (unpack, unpack_prefix):
        assert how(forge.sealed_frame(forge.TEXT, key=KEY), key=KEY)
        with pytest.raises(error) as caught:
            how(data, key=KEY)
        assert caught.value.cure


def test_a_reader_without_a_key_refuses_what_is_sealed():
    for how in (unpack, unpack_prefix):
        with pytest.raises(NotAuthentic, match="holds no key"):
            how(forge.sealed_frame(forge.TEXT, key=KEY))


def test_a_sealed_frame_has_no_prefix():
    data = forge.sealed_frame(forge.TEXT, key=KEY)
    for cut in range(len(forge.header()), len(data)):
        with pytest.raises(NotAuthentic, match="is cut"):
            unpack_prefix(data[:cut], key=KEY)


def _end(count: int, digest_of: bytes, extra: bytes = b"") -> bytes:
    body = forge.varint(count) + struct.pack("<Q", xxhash.xxh3_64_intdigest(digest_of)) + extra
    return forge.segment(255, body)


HEAD = forge.header()
ONE = HEAD + forge.TEXT
SEGMENTS = {
    "unknown critical": (forge.frame(forge.segment(99, b"x")), UnknownSegment),
    "type 0 critical": (forge.frame(forge.segment(0, b"x")), UnknownSegment),
    "reserved flag": (forge.frame(forge.segment(32, b"hi", flags=3)), Malformed),
    "all flags": (forge.frame(forge.segment(32, b"hi", flags=255)), Malformed),
    "critical type marked ancillary": (forge.frame(forge.segment(32, b"hi", flags=0)), Malformed),
    "ancillary type marked critical": (forge.frame(forge.segment(6, b"", flags=1)), Malformed),
    "wrong order": (forge.frame(forge.TEXT, forge.segment(16, b"x")), Malformed),
    "padded length": (forge.frame(forge.segment(32, b"hi", length=b"\x82\x00")), Malformed),
    "length 2**40": (forge.frame(forge.segment(32, b"hi", length=forge.varint(2**40))), LimitExceeded),
    "length 2**62": (forge.frame(forge.segment(32, b"hi", length=forge.varint(2**62))), LimitExceeded),
    "endless length": (forge.frame(forge.segment(32, b"hi", length=b"\xff" * 12)), Malformed),
    "length over END": (HEAD + forge.segment(32, b"hi" + forge.closed(ONE, 1)[len(ONE) :]), Truncated),
    "length beyond the bytes": (forge.frame(forge.segment(32, b"hi", length=forge.varint(1000))), Truncated),
    "length short by one": (forge.frame(forge.segment(32, b"hi", length=b"\x01")), ChecksumMismatch),
    "no END": (ONE, Truncated),
    "header alone": (HEAD, Truncated),
    "END counts too few": (forge.closed(ONE, 0), Malformed),
    "END counts too many": (forge.closed(ONE, 2), Malformed),
    "END counts 2**60": (forge.closed(ONE, 2**60), Malformed),
    "END of another frame": (ONE + _end(1, HEAD), ChecksumMismatch),
    "END with a tail inside": (ONE + _end(1, ONE, b"\0"), Malformed),
    "empty END": (ONE + forge.segment(255, b""), Malformed),
    "END not critical": (ONE + forge.segment(255, b"", flags=0), Malformed),
    "segment after END": (forge.closed(ONE, 1) + forge.TEXT, Malformed),
    "nothing": (b"", Truncated),
    "text": (b"GET / HTTP/1.1\r\n\r\n" * 9, Malformed),
    "zeros": (bytes(4096), Malformed),
}


@pytest.mark.parametrize(("data", "error"), SEGMENTS.values(), ids=SEGMENTS)
def test_segments(data, error):
    with pytest.raises(error) as caught:
        unpack(data)
    assert caught.value.cure


def test_unknown_ancillary_segments_are_skipped_and_kept():
    data = forge.frame(forge.segment(12, b"?", flags=0), forge.TEXT, forge.segment(99, b"!", flags=0))
    frame = unpack(data)
    assert [segment.body for segment in frame.skipped] == [b"?", b"!"]
    assert [segment.body for segment in frame.segments] == [b"hi"]
    assert pack(frame) == data


def test_limits():
    data = HONEST["kv"]
    unpack(data, Limits(max_bytes=len(data)))
    with pytest.raises(LimitExceeded, match="bytes"):
        unpack(data, Limits(max_bytes=len(data) - 1))
    with pytest.raises(LimitExceeded, match="segments"):
        unpack(data, Limits(max_segments=len(KV_FRAME.segments) - 1))
    with pytest.raises(LimitExceeded, match="tokens"):
        unpack(data, Limits(max_tokens=4))


def _with(kind: SegmentType, *bodies: bytes):
    """The honest KV frame with other segments of one type."""
    others = tuple(segment for segment in KV_FRAME.segments if segment.type != kind)
    return replace(KV_FRAME, segments=(*others, *(Segment(kind, body) for body in bodies)))


def _numbers(*values: int) -> bytes:
    return b"".join(forge.varint(value) for value in values)


PAYLOAD = KV_FRAME.bodies(SegmentType.PAYLOAD)
SHAPE = (1, 1, 3, 2, 1, 2, 1, 1)
CACHES = {
    "no SPEC": (_with(SegmentType.SPEC), Malformed),
    "two SPECs": (_with(SegmentType.SPEC, b"raw", b"raw"), Malformed),
    "codec unknown": (_with(SegmentType.SPEC, b"pickle(protocol=5)"), CodecNotCovered),
    "codec is a module": (_with(SegmentType.SPEC, b"os"), CodecNotCovered),
    "codec is a path": (_with(SegmentType.SPEC, b"kvferry.codec.raw:Raw"), Malformed),
    "codec is a call": (_with(SegmentType.SPEC, b"int(bits=__import__('os').getpid())"), Malformed),
    "codec nested": (_with(SegmentType.SPEC, b"int" + 100 * b"(" + 100 * b")"), Malformed),
    "codec endless": (_with(SegmentType.SPEC, b"int(group=" + 300 * b"9" + b")"), Malformed),
    "codec option unknown": (_with(SegmentType.SPEC, b"int(path=etc)"), Malformed),
    "codec option wrong": (
        _with(SegmentType.SPEC, repr(CODECS.parse("int(4)")).replace("=32", "=-1").encode()),
        Malformed,
    ),
    "codec spec not canonical": (_with(SegmentType.SPEC, b"int(4)"), Malformed),
    "codec spec no ASCII": (_with(SegmentType.SPEC, "int(grüp=1)".encode()), Malformed),
    "another codec": (_with(SegmentType.SPEC, b"raw(dtype=float32, zstd=0)"), Malformed),
    "another group": (_with(SegmentType.SPEC, repr(CODECS.parse("int(4, group=1)")).encode()), Malformed),
    "no SHAPE": (_with(SegmentType.SHAPE), Malformed),
    "empty SHAPE": (_with(SegmentType.SHAPE, b""), Malformed),
    "SHAPE cut": (_with(SegmentType.SHAPE, _numbers(0, 0, *SHAPE)[:-1]), Malformed),
    "SHAPE of a third space": (_with(SegmentType.SHAPE, _numbers(2, 0, *SHAPE)), Malformed),
    "SHAPE of 2**34 layers": (_with(SegmentType.SHAPE, _numbers(0, 0, 2**34, 1, 3, 2)), Malformed),
    "SHAPE of other dims": (_with(SegmentType.SHAPE, _numbers(0, 0, 1, 1, 3, 3, 1, 2, 1, 1)), Malformed),
    "SHAPE padded": (_with(SegmentType.SHAPE, b"\x80\0" + _numbers(0, *SHAPE)), Malformed),
    "TOKENS that says all": (_with(SegmentType.TOKENS, _numbers(2, 0, 0, 5)), Malformed),
    "TOKENS of 1 layer": (_with(SegmentType.TOKENS, _numbers(1, 0, 0, 5)), Malformed),
    "TOKENS of 3 layers": (_with(SegmentType.TOKENS, _numbers(3, 0, 0, 5)), Malformed),
    "TOKENS of 2**60 layers": (_with(SegmentType.TOKENS, _numbers(2**60, 0, 0, 5)), Malformed),
    "TOKENS run of 0 layers": (_with(SegmentType.TOKENS, _numbers(0, 0, 0, 5, 2, 0, 0, 4)), Malformed),
    "TOKENS out of range": (_with(SegmentType.TOKENS, _numbers(1, 0, 0, 5, 1, 0, 4, 2)), Malformed),
    "TOKENS of length 2**60": (_with(SegmentType.TOKENS, _numbers(1, 0, 0, 5, 1, 0, 0, 2**60)), Malformed),
    "TOKENS with a token in no layer": (_with(SegmentType.TOKENS, _numbers(2, 0, 0, 4)), Malformed),
    "TOKENS of the second best mode": (_with(SegmentType.TOKENS, _numbers(1, 0, 0, 5, 1, 1, 19)), Malformed),
    "TOKENS range with a parameter": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 4, 0, 4)), Malformed),
    "TOKENS gaps of 2**60 tokens": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 2, 2**60)), Malformed),
    "TOKENS gaps of parameter 2**60": (
        _with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 2**62 + 2, 1)),
        Malformed,
    ),
    "TOKENS gaps of parameter 30": (
        _with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 122, 1) + bytes(9)),
        Malformed,
    ),
    "TOKENS gaps cut": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 2, 3, 3)), Malformed),
    "TOKENS gaps beyond the tokens": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 2, 1, 64)), Malformed),
    "TOKENS gaps without an end": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 2, 1)), Malformed),
    "TOKENS gaps with padding set": (_with(SegmentType.TOKENS, _numbers(1, 3, 0, 1, 3, 2, 76)), Malformed),
    "TOKENS bitmap with padding set": (
        _with(SegmentType.TOKENS, _numbers(1, 0, 0, 5, 1, 1, 0x73)),
        Malformed,
    ),
    "TOKENS range for a bitmap": (_with(SegmentType.TOKENS, _numbers(1, 0, 0, 5, 1, 1, 19)), Malformed),
    "TOKENS cut": (_with(SegmentType.TOKENS, _numbers(1, 0, 0)), Malformed),
    "TOKENS empty": (_with(SegmentType.TOKENS, b""), Malformed),
    "POSITIONS that says nothing": (_with(SegmentType.POSITIONS, _numbers(1, 1, 0, 5)), Malformed),
    "POSITIONS for 4": (_with(SegmentType.POSITIONS, _numbers(1, 1, 2, 4)), Malformed),
    "POSITIONS for 2**34": (_with(SegmentType.POSITIONS, _numbers(1, 1, 2, 2**34)), Malformed),
    "POSITIONS beyond 2**31": (_with(SegmentType.POSITIONS, _numbers(1, 1, 2**34, 5)), Malformed),
    "POSITIONS of 0 axes": (_with(SegmentType.POSITIONS, _numbers(0)), Malformed),
    "POSITIONS of 2**34 axes": (_with(SegmentType.POSITIONS, _numbers(2**34, 1, 2, 5)), Malformed),
    "POSITIONS of 2**34 runs": (_with(SegmentType.POSITIONS, _numbers(1, 2**34, 2, 5)), Malformed),
    "POSITIONS in needless runs": (_with(SegmentType.POSITIONS, _numbers(1, 2, 2, 3, 0, 2)), Malformed),
    "POSITIONS with a tail": (_with(SegmentType.POSITIONS, _numbers(1, 1, 2, 5, 0)), Malformed),
    "POSITIONS empty": (_with(SegmentType.POSITIONS, b""), Malformed),
    "ROLES all text": (_with(SegmentType.ROLES, _numbers(0, 5)), Malformed),
    "ROLES for 4": (_with(SegmentType.ROLES, _numbers(1, 4)), Malformed),
    "ROLES for 2**34": (_with(SegmentType.ROLES, _numbers(1, 2**34)), Malformed),
    "ROLES 256": (_with(SegmentType.ROLES, _numbers(256, 5)), Malformed),
    "ROLES odd": (_with(SegmentType.ROLES, _numbers(1, 4, 1)), Malformed),
    "ROLES in needless runs": (_with(SegmentType.ROLES, _numbers(1, 4, 1, 1)), Malformed),
    "manifest of 70 kB": (_with(SegmentType.ROLES, bytes(70_000)), LimitExceeded),
    "PAYLOAD missing": (_with(SegmentType.PAYLOAD), Malformed),
    "PAYLOAD of one layer": (_with(SegmentType.PAYLOAD, PAYLOAD[0]), Malformed),
    "PAYLOAD of three layers": (_with(SegmentType.PAYLOAD, *PAYLOAD, b""), Malformed),
    "PAYLOAD short by one": (_with(SegmentType.PAYLOAD, PAYLOAD[0][:-1], PAYLOAD[1]), Malformed),
    "PAYLOAD long by one": (_with(SegmentType.PAYLOAD, PAYLOAD[0] + b"\0", PAYLOAD[1]), Malformed),
    "scale 0": (_with(SegmentType.PAYLOAD, bytes(len(PAYLOAD[0])), PAYLOAD[1]), Malformed),
    "scale infinite": (_with(SegmentType.PAYLOAD, b"\0\x7c" + PAYLOAD[0][2:], PAYLOAD[1]), Malformed),
    "scale NaN": (_with(SegmentType.PAYLOAD, b"\0\x7e" + PAYLOAD[0][2:], PAYLOAD[1]), Malformed),
    "scale negative": (_with(SegmentType.PAYLOAD, b"\0\xbc" + PAYLOAD[0][2:], PAYLOAD[1]), Malformed),
    "code -8": (
        _with(SegmentType.PAYLOAD, PAYLOAD[0][:10] + b"\x08" + PAYLOAD[0][11:], PAYLOAD[1]),
        Malformed,
    ),
    "half byte not 0": (
        _with(SegmentType.PAYLOAD, PAYLOAD[0][:17] + b"\x11" + PAYLOAD[0][18:], PAYLOAD[1]),
        Malformed,
    ),
    "text inside": (_with(SegmentType.TEXT, b"hi"), Malformed),
    "not a KV frame": (replace(KV_FRAME, kind=MessageKind.TEXT), Malformed),
    "step without use": (replace(KV_FRAME, step=1), Malformed),
    "profile without use": (replace(KV_FRAME, profile_hash=1), ForeignProfile),
    "classes without use": (_with(SegmentType.CLASSES, b"\2\2\1"), Malformed),
    "weights without use": (_with(SegmentType.WEIGHTS, b""), Malformed),
    "one token more": (replace(KV_FRAME, n_tokens=6), Malformed),
    "no tokens": (replace(KV_FRAME, n_tokens=0), Malformed),
    "2**20 tokens": (replace(KV_FRAME, n_tokens=1 << 20), Malformed),
    "2**32 tokens": (replace(KV_FRAME, n_tokens=2**32 - 1), LimitExceeded),
}


@pytest.mark.parametrize(("frame", "error"), CACHES.values(), ids=CACHES)
def test_caches(frame, error):
    with pytest.raises(error) as caught:
        decode(frame, KV_CACHE.geometry)
    assert caught.value.cure


def test_spans_must_fit_their_tokens():
    spans = spans_segment(contract.spans(4))
    with pytest.raises(Malformed, match="SPANS"):
        decode(replace(KV_FRAME, segments=(*KV_FRAME.segments, spans)), KV_CACHE.geometry)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_raw_numbers_must_be_finite(dtype):
    kv = contract.cache(((1, 1, 1),), n_tokens=1)
    frame = CODECS.parse(f"raw({dtype})").encode(kv)
    (body,) = frame.bodies(SegmentType.PAYLOAD)
    bad = tuple(
        Segment(s.type, b"\xff" * len(body)) if s.type == SegmentType.PAYLOAD else s for s in frame.segments
    )
    with pytest.raises(Malformed, match="NaN"):
        decode(replace(frame, segments=bad), kv.geometry)


def test_a_message_imports_nothing_outside_the_table(monkeypatch):
    asked = []
    monkeypatch.setattr("kvferry.spec.importlib.import_module", asked.append)
    for name in (b"os", b"antigravity", b"evil(a=1)"):
        with pytest.raises(CodecNotCovered):
            codec_of(kv_frame(KV_CACHE.geometry, 0, (Segment(SegmentType.SPEC, name),)))
    assert asked == []


def test_mutated_segments_give_typed_errors_or_finite_caches():
    """Checksums are right here: what is read is hostile, not damaged."""
    chance = random.Random(0)
    for spec in ("int(4)", "int(8, axis=channel)", "raw(float16)"):
        honest = CODECS.parse(spec).encode(KV_CACHE, HOLES)
        for _ in range(120):
            segments = [_mutated(segment, chance) for segment in honest.segments]
            try:
                came = decode(unpack(pack(replace(honest, segments=tuple(segments)))), KV_CACHE.geometry)
            except KvferryError:
                continue
            assert all(group.keys.isfinite().all() and group.values.isfinite().all() for group in came.groups)


def _mutated(segment: Segment, chance: random.Random) -> Segment:
    body = bytearray(segment.body)
    if body and chance.random() < 0.3:
        body[chance.randrange(len(body))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    return Segment(segment.type, bytes(body), segment.critical)


BOMBS = {
    "length 2**29": forge.header() + forge.segment(32, b"", length=forge.varint(1 << 29)),
    "2**20 tokens": forge.frame(n_tokens=1 << 20, kind=1),
    "1,000 segments": forge.frame(*[forge.segment(16, b"")] * 1000, kind=1),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_memory_of_unpack_follows_the_input(data):
    peak = _peak(lambda: unpack_prefix(data))
    assert peak < 1_000_000 + 2 * len(data)


@pytest.mark.parametrize(
    "name", ["2**20 tokens", "PAYLOAD missing", "POSITIONS for 2**34", "TOKENS of 2**60 layers"]
)
def test_memory_of_decode_follows_the_tokens(name):
    frame, _ = CACHES[name]
    assert _peak(lambda: _refuse(frame)) < 1_000_000 + 100 * frame.n_tokens


def _refuse(frame) -> None:
    with pytest.raises(Malformed):
        decode(frame, KV_CACHE.geometry)


def _peak(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bitmap_and_holes_come_back():
    came = decode(unpack(HONEST["kv"]), KV_CACHE.geometry)
    assert np.array_equal(came.present[:, 0].numpy(), HOLES.classes[:, 0].numpy() > 0)
