"""Hostile payloads of the codecs: checksums are right, the numbers inside lie. Refused by name, with little memory."""

import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
import zstandard

import contract
from attacks import forge
from fuzz import oracle
from fuzz.mutate import NUMBERS
from fuzz.seeds import seeds
from fuzz.structure import parts_of, written
from kvferry.codec import CODECS, Codec, decode, integer_fast
from kvferry.errors import (
    ForeignModel,
    ForeignProfile,
    KvferryError,
    LimitExceeded,
    Malformed,
    NotFinite,
    Truncated,
    UsageError,
    WireError,
)
from kvferry.kv import Plan
from kvferry.session.message import Message, text_message
from kvferry.session.survey import survey
from kvferry.wire import Frame, Limits, MessageKind, Segment, SegmentType, pack, unpack
from profiles import held_profile
from specs import SPECS, untried

KV_CACHE = contract.cache(((1, 3, 2), (2, 4, 1)), n_tokens=5)
every_spec = pytest.mark.parametrize("spec", SPECS)
FRAMES = [seed for seed in seeds() if not seed.datagrams]
every_seed = pytest.mark.parametrize("seed", FRAMES, ids=lambda seed: seed.name)


def test_every_codec_and_option_is_attacked():
    assert untried(SPECS) == []


def payloads(frame: Frame, *bodies: bytes) -> Frame:
    """The frame with other PAYLOAD segments."""
    others = tuple(segment for segment in frame.segments if segment.type != SegmentType.PAYLOAD)
    return replace(frame, segments=(*others, *(Segment(SegmentType.PAYLOAD, body) for body in bodies)))


def _plain(codec: Codec) -> list[bytes]:
    """The payloads without a second stage."""
    alone = replace(codec, zstd=0) if "zstd" in codec.config() else codec
    return alone.encode(KV_CACHE).bodies(SegmentType.PAYLOAD)


@every_spec
def test_a_payload_of_any_other_length(spec):
    frame = CODECS.parse(spec).encode(KV_CACHE)
    first, *others = frame.bodies(SegmentType.PAYLOAD)
    lengths = [*range(len(first)), len(first) + 1, len(first) + 100]
    for length in lengths:
        with pytest.raises(Malformed):
            decode(payloads(frame, first.ljust(length, b"\1")[:length], *others), KV_CACHE.geometry)


@every_spec
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x3C, 0x7F, 0x80, 0xFF])
def test_a_payload_of_one_byte_repeated(spec, byte):
    """A plain body of zeros, largest scales, NaN, ...: refused, or finite numbers."""
    codec = CODECS.parse(spec)
    frame = codec.encode(KV_CACHE)
    plain = _plain(codec)
    _refused_or_finite(payloads(frame, *(bytes([byte]) * len(body) for body in plain)))


@every_spec
@pytest.mark.parametrize("bits", [0x0000, 0x0001, 0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0x8001, 0xFF7F])
def test_any_first_number_of_a_payload(spec, bits):
    """Scales, means and numbers at the ends of their range, with the largest codes behind them."""
    codec = CODECS.parse(spec)
    frame = codec.encode(KV_CACHE)
    plain = _plain(codec)
    for width in (2, 4, 10, 22):
        for rest in (0x7F, 0x77, 0x11):
            bodies = [
                (struct.pack("<H", bits) * (width // 2)).ljust(len(body), bytes([rest])) for body in plain
            ]
            cut = [body[: len(one)] for body, one in zip(bodies, plain, strict=True)]
            _refused_or_finite(payloads(frame, *cut))


def _refused_or_finite(frame: Frame) -> None:
    try:
        came = decode(frame, KV_CACHE.geometry)
    except Malformed:
        return
    for group in came.groups:
        assert bool(torch.isfinite(group.keys).all())
        assert bool(torch.isfinite(group.values).all())


@pytest.mark.parametrize("axis", ["token", "channel", "head", "block"])
@pytest.mark.parametrize("group", [2**31, 2**62, 2**63 - 1, 2**64, 10**30])
def test_a_group_beyond_any_row(group, axis, monkeypatch):
    """It is the whole row, for compiled loops too, whatever their numbers hold."""
    monkeypatch.setattr(integer_fast, "SMALLEST", 0)
    whole, huge = (CODECS.parse(f"int(4, group={size}, axis={axis})") for size in (0, group))
    one, other = whole.encode(KV_CACHE), huge.encode(KV_CACHE)
    assert one.bodies(SegmentType.PAYLOAD) == other.bodies(SegmentType.PAYLOAD)
    contract.same(decode(one, KV_CACHE.geometry), decode(other, KV_CACHE.geometry))


@every_spec
@pytest.mark.parametrize("size", [1e10, 1e27, 1e37, 3.3e38])
def test_the_largest_numbers_come_back_finite_or_are_refused(spec, size):
    kv = contract.cache(((2, 4, 4),), n_tokens=3)
    (group,) = kv.groups
    group.keys.copy_(group.keys.sign() * size)
    try:
        frame = CODECS.parse(spec).encode(kv)
    except (NotFinite, UsageError):
        assert (
            "fp16" in spec or "float16" in spec or (spec.startswith(("ecsq", "progressive")) and size > 1e25)
        )
        return
    came = decode(frame, kv.geometry)
    assert bool(torch.isfinite(came.groups[0].keys).all())


WEIGHTS = [0, 1, 7, 8 * 87, 8 * 88, 1000, 1024, 1025, 2**34, -1, -1000, -1024, -1025]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("step", [-1025, -1024, 0, 500, 1024, 1025])
def test_steps_and_weights_at_their_extremes(weight, step):
    """Numbers and means stay finite, in every precision class."""
    plan = Plan.everything(KV_CACHE)
    plan.classes[:, :, 2:] = 15
    frame = CODECS.parse("ecsq(weighting=part)").encode(KV_CACHE, plan)
    body = b"".join(forge.varint(2 * abs(w) - (w < 0)) for w in (weight, weight))
    others = tuple(s for s in frame.segments if s.type != SegmentType.WEIGHTS)
    forged = replace(frame, step=step, segments=(*others, Segment(SegmentType.WEIGHTS, body)))
    _refused_or_finite(forged)


SPECS_WITH_FILES = [
    "profile=llama",
    "profile=none",
    "profile=p0000000000000001",
    "profile=tests",
    "profile='..'",
]


@pytest.mark.parametrize("option", SPECS_WITH_FILES)
def test_a_spec_names_no_file(option, monkeypatch):
    frame = CODECS.parse("ecsq").encode(KV_CACHE)
    others = tuple(segment for segment in frame.segments if segment.type != SegmentType.SPEC)
    spec = Segment(SegmentType.SPEC, f"ecsq({option})".encode())
    monkeypatch.setattr("kvferry.codec.profiles.load_profile", pytest.fail)
    with pytest.raises(Malformed):
        decode(replace(frame, segments=(*others, spec)), KV_CACHE.geometry)


def test_a_profile_that_nobody_holds_costs_no_more_each_time(monkeypatch):
    frame = replace(CODECS.parse("ecsq").encode(KV_CACHE), profile_hash=1)
    asked = []
    for _ in range(3):
        with pytest.raises(ForeignProfile):
            decode(frame, KV_CACHE.geometry)
        monkeypatch.setattr("kvferry.codec.profiles.load_profile", asked.append)
    assert asked == []


def test_a_profile_of_another_model_is_refused():
    hold = held_profile(KV_CACHE.geometry)
    own = CODECS.parse(f"ecsq(profile={hold.name})").encode(KV_CACHE)
    _refused_or_finite(own)
    other = contract.geometry(((1, 3, 2), (2, 4, 1)), model="ee")
    with pytest.raises(ForeignModel):
        decode(own, other)
    for forged in (
        replace(own, profile_hash=0),
        replace(CODECS.parse("raw").encode(KV_CACHE), profile_hash=hold.wire_hash),
    ):
        with pytest.raises((Malformed, ForeignProfile)):
            decode(forged, KV_CACHE.geometry)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "zstd" in spec])
def test_a_bomb_behind_the_second_stage(spec):
    """A zstd frame may state the length that the shape gives, and no other; what it holds must keep to it."""
    frame = CODECS.parse(spec).encode(KV_CACHE)
    plain = _plain(CODECS.parse(spec))
    bomb = zstandard.ZstdCompressor(19).compress(bytes(1 << 28))
    liar = bytearray(zstandard.ZstdCompressor(19).compress(bytes(200)))
    assert len(bomb) < 40_000
    for body in (bomb, _stating(bomb, len(plain[0])), bytes(liar), bomb[:20], liar[:-3], _unstated(plain[0])):
        with pytest.raises(Malformed):
            decode(payloads(frame, bytes(body), plain[1]), KV_CACHE.geometry)
        assert _peak(lambda body=body: _refused_or_finite(payloads(frame, bytes(body), plain[1]))) < 1_000_000


def _stating(bomb: bytes, length: int) -> bytes:
    """A bomb whose header says a harmless length: single segment, content size of 4 bytes."""
    size = zstandard.frame_header_size(bomb)
    return bomb[:4] + bytes([0xA0]) + struct.pack("<I", length) + bomb[size:]


def _unstated(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(plain)


@pytest.mark.parametrize(
    "stated", [0, 1, 21, 1 << 20, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
)
def test_a_text_that_states_another_length(stated):
    packed = zstandard.ZstdCompressor(19).compress(b"Ann has tea in Oslo.")
    size = zstandard.frame_header_size(packed)
    forged = packed[:4] + bytes([0xE0]) + struct.pack("<Q", stated) + packed[size:]
    frame = Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT_ZSTD, forged),))
    with pytest.raises((Malformed, LimitExceeded)):
        _ = Message(pack(frame)).text
    found, error = survey(pack(frame))
    assert isinstance(error, WireError) and found.text is None


def test_a_text_is_one_zstd_frame_and_nothing_else():
    packed = zstandard.ZstdCompressor(19).compress(b"Ann has tea in Oslo.")
    for body in (packed + b"\0", packed + packed, packed[:-1], b"", b"hi"):
        with pytest.raises(Malformed):
            _ = Message(pack(Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT_ZSTD, body),)))).text
    twice = (Segment(SegmentType.TEXT_ZSTD, packed), Segment(SegmentType.TEXT, b"Ann has tea in Oslo."))
    with pytest.raises(Malformed):
        _ = Message(pack(Frame(MessageKind.TEXT, segments=twice))).text
    assert text_message("", compress=True).text == ""


def test_a_text_bomb_is_refused_before_it_is_opened():
    bomb = zstandard.ZstdCompressor(19).compress(bytes((1 << 30) + 1))
    frame = Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT_ZSTD, bomb),))

    def read() -> None:
        with pytest.raises(LimitExceeded):
            _ = Message(pack(frame)).text

    assert _peak(read) < 2_000_000


@every_seed
def test_cut_at_every_byte(seed):
    for cut in range(len(seed.data)):
        with pytest.raises(Truncated):
            unpack(seed.data[:cut], agreements=seed.agreements, key=seed.key)


@every_seed
def test_every_header_field_at_its_extremes(seed):
    """With the header's checksum right: refused, or read to the same bytes."""
    parts = parts_of(seed)
    for name, old in parts.fields.items():
        for value in (*NUMBERS, -1, -(2**15)) if isinstance(old, int) else (b"\0\0\0\0", b"\x89PNG"):
            try:
                data = written(replace(parts, fields={**parts.fields, name: value}))
            except struct.error:
                continue  # the field cannot even say that
            oracle.check(seed, data)


@every_seed
def test_every_segment_left_out_doubled_and_emptied(seed):
    parts = parts_of(seed)
    for at, (kind, flags, body) in enumerate(parts.segments):
        before, after = parts.segments[:at], parts.segments[at + 1 :]
        for found in ((), ((kind, flags, body),) * 2, ((kind, flags, b""),), ((kind, flags, body + b"\0"),)):
            oracle.check(seed, written(replace(parts, segments=(*before, *found, *after))))


@every_seed
@pytest.mark.parametrize("length", [2**31, 2**32, 2**40, 2**62])
def test_a_segment_of_huge_length(seed, length):
    parts = parts_of(seed)
    kind, flags, body = parts.segments[-1]
    data = written(parts)[: -len(forge.segment(255, bytes(9)))] + forge.segment(
        kind, body, flags, length=forge.varint(length)
    )
    found = []

    def read() -> None:
        try:
            unpack(data, Limits(max_bytes=1 << 20), seed.agreements, seed.key)
        except KvferryError as error:
            found.append(error)

    assert _peak(read) < 200_000
    assert isinstance(found[0], WireError)


def _peak(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
