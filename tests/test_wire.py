"""KVWire without tensors: what is packed comes back, in one way only, and text and JSON are strict."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from attacks import forge
from kvferry.codec import CODECS, decode
from kvferry.codec.classes import write_classes
from kvferry.codec.sets import write_set
from kvferry.errors import LimitExceeded, Malformed, Truncated, UnknownContract, UsageError
from kvferry.wire import (
    HEADER_BYTES,
    MAC_BYTES,
    SHORT_HEADER_BYTES,
    Agreement,
    Frame,
    FrameType,
    Limits,
    MessageKind,
    Segment,
    SegmentType,
    TokenGrid,
    cut,
    json_frame,
    pack,
    packed_bytes,
    read_json,
    read_text,
    text_frame,
    unpack,
    unpack_prefix,
)
from kvferry.wire.varint import read_varint, write_varint

FORMAT = Path(__file__).parents[1] / "docs" / "format.md"
KNOWN = [kind for kind in SegmentType if kind != SegmentType.END]
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
FEW = Limits(max_tokens=2**32)
KEY = bytes(range(32))
OTHER = Agreement(model_hash=1, profile_hash=2)


FIELDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(MessageKind),
        "frame_type": st.sampled_from(FrameType),
        "frame_id": U32,
        "distance": st.integers(1, 2**16 - 1),
        "reference_hash": U64,
        "grid": st.sampled_from(TokenGrid),
        "minor": st.integers(0, 255),
        "short": st.booleans(),
        "step": st.integers(-(2**15), 2**15 - 1),
        "n_tokens": U32,
        "model_hash": U64,
        "geometry_hash": U64,
        "tokenizer_hash": U64,
        "profile_hash": U64,
        "segments": st.lists(st.tuples(st.sampled_from(KNOWN), st.binary(max_size=200)), max_size=6),
        "skipped": st.lists(st.tuples(st.sampled_from([0, 12, 99, 254]), st.binary(max_size=9)), max_size=3),
    }
)


def made(fields) -> Frame:
    """A P frame refers back as far as its id allows and is never short; an I frame refers to nothing."""
    fields = dict(fields)
    distance = min(fields.pop("distance"), fields["frame_id"])
    is_p = fields["frame_type"] == FrameType.P and distance > 0
    segments = [Segment(kind, body, kind != SegmentType.SPANS) for kind, body in fields["segments"]]
    skipped = [Segment(kind, body, critical=False) for kind, body in fields["skipped"]]
    whole = {
        "frame_type": FrameType(is_p),
        "reference_id": fields["frame_id"] - distance if is_p else 0,
        "reference_hash": fields["reference_hash"] if is_p else 0,
        "short": fields["short"] and not is_p,
        "segments": tuple(segments),
        "skipped": tuple(skipped),
    }
    return Frame(**{**fields, **whole})


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "sealed"])
@settings(deadline=None, max_examples=40)
@given(fields=FIELDS)
def test_what_is_packed_comes_back(key, fields):
    frame = made(fields)
    data = pack(frame, key)
    agreements = (OTHER, frame.agreement)
    assert unpack(data, FEW, agreements, key) == frame
    assert pack(unpack(data, FEW, agreements, key), key) == data
    lengths = [len(s.body) for s in (*frame.segments, *frame.skipped)]
    header_bytes = SHORT_HEADER_BYTES if frame.short else HEADER_BYTES
    assert len(data) == packed_bytes(lengths, header_bytes, MAC_BYTES if key else 0)


@settings(deadline=None, max_examples=10)
@given(fields=FIELDS)
def test_a_prefix_gives_whole_segments_and_never_more(fields):
    frame = made(fields)
    data, agreements = pack(frame), (frame.agreement,)
    for length in range(SHORT_HEADER_BYTES if frame.short else HEADER_BYTES, len(data)):
        prefix = unpack_prefix(data[:length], FEW, agreements)
        assert prefix.missing
        assert prefix.n_bytes_used <= length
        assert prefix.frame.segments == frame.segments[: len(prefix.frame.segments)]
    whole = unpack_prefix(data, FEW, agreements)
    assert (whole.frame, whole.n_bytes_used, whole.missing) == (frame, len(data), None)


def test_the_order_of_segments_does_not_matter():
    segments = [
        Segment(SegmentType.PAYLOAD, b"1"),
        Segment(SegmentType.SPEC, b"2"),
        Segment(SegmentType.PAYLOAD, b"3"),
    ]
    one = Frame(MessageKind.KV, segments=tuple(segments))
    other = Frame(MessageKind.KV, segments=(segments[1], segments[0], segments[2]))
    assert pack(one) == pack(other)
    assert one.bodies(SegmentType.PAYLOAD) == [b"1", b"3"]
    assert one.body(SegmentType.SPEC) == b"2"
    assert one.body(SegmentType.SHAPE) is None
    with pytest.raises(Malformed, match="2 segments PAYLOAD"):
        one.body(SegmentType.PAYLOAD)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind):
    data = pack(text_frame("hi"))
    assert unpack(kind(data)) == text_frame("hi")


def test_a_frame_from_the_specification_alone_is_ours():
    assert forge.frame(forge.TEXT) == pack(text_frame("hi"))
    assert forge.short_frame(forge.TEXT) == pack(replace(text_frame("hi"), short=True))
    assert forge.sealed_frame(forge.TEXT, key=KEY) == pack(text_frame("hi"), KEY)


def test_headers_are_small():
    assert HEADER_BYTES == len(forge.header()) == 64
    assert SHORT_HEADER_BYTES == len(forge.short_header()) == 24


def test_a_contract_id_is_computed_from_what_was_agreed():
    assert Agreement(1, 2, 3, 4, minor=5).contract_id == forge.contract_id(5, 1, 2, 3, 4)
    frame = Frame(MessageKind.KV, model_hash=1, geometry_hash=2, tokenizer_hash=3, profile_hash=4)
    ids = {
        replace(frame, **{field: 9}).agreement.contract_id for field in (*frame.agreement.__dict__, "step")
    }
    assert len(ids) == 6
    with pytest.raises(UsageError, match="out of range"):
        Agreement(model_hash=2**64).contract_id.bit_length()


def test_a_short_header_needs_an_agreement():
    frame = Frame(MessageKind.KV, model_hash=1, short=True)
    assert unpack(pack(frame), agreements=(OTHER, frame.agreement)) == frame
    for agreements in ((), (OTHER,)):
        with pytest.raises(UnknownContract, match="hello first"):
            unpack(pack(frame), agreements=agreements)


def test_a_later_minor_is_read():
    frame = Frame(MessageKind.KV, minor=7)
    assert unpack(pack(frame)).minor == 7


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(65)])
def test_a_key_has_16_to_64_bytes(key):
    with pytest.raises(UsageError, match=f"key of {len(key)} bytes"):
        pack(text_frame("hi"), key)
    with pytest.raises(UsageError, match=f"key of {len(key)} bytes"):
        unpack(forge.sealed_frame(forge.TEXT, key=key[:64]), key=key)


@pytest.mark.parametrize(
    "fields",
    [
        {"frame_id": 2**32},
        {"frame_id": -1},
        {"n_tokens": 2**40},
        {"model_hash": 2**64},
        {"step": 2**15},
        {"reference_id": 1},
        {"reference_hash": 1},
        {"frame_type": FrameType.P},
        {"frame_type": FrameType.P, "frame_id": 1, "reference_id": 1},
        {"frame_type": FrameType.P, "frame_id": 1, "reference_id": 2},
        {"frame_type": FrameType.P, "frame_id": 2**16},
        {"frame_type": FrameType.P, "frame_id": 1, "short": True},
        {"minor": 256},
        {"model_hash": 2**64, "short": True},
        {"segments": (Segment(SegmentType.END, b""),)},
        {"segments": (Segment(12, b""),)},
        {"segments": (Segment(SegmentType.SPEC, b"", critical=False),)},
        {"segments": (Segment(SegmentType.SPANS, b""),)},
        {"skipped": (Segment(SegmentType.SPEC, b""),)},
        {"skipped": (Segment(12, b"", critical=True),)},
    ],
)
def test_pack_refuses_what_it_could_not_read_again(fields):
    with pytest.raises(UsageError):
        pack(Frame(MessageKind.KV, **fields))


@settings(deadline=None, max_examples=50)
@given(value=st.integers(0, 2**63 - 1))
def test_varint(value):
    data = write_varint(value)
    assert data == forge.varint(value)
    assert read_varint(memoryview(data), 0) == (value, len(data))
    assert all(read_varint(memoryview(data[:cut]), 0) is None for cut in range(len(data)))


@settings(deadline=None, max_examples=30)
@given(text=st.text())
def test_text(text):
    assert read_text(unpack(pack(text_frame(text)))) == text


def test_text_is_utf8():
    with pytest.raises(UsageError, match="surrogate"):
        text_frame("\ud800")
    with pytest.raises(Malformed, match="UTF-8 at byte 1"):
        read_text(Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT, b"a\xff"),)))
    with pytest.raises(Malformed, match="without segment TEXT"):
        read_text(Frame(MessageKind.TEXT))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=30)
@given(content=st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_json(content):
    frame = json_frame(MessageKind.HELLO, content)
    assert read_json(unpack(pack(frame))) == content
    assert pack(json_frame(MessageKind.HELLO, dict(reversed(content.items())))) == pack(frame)


@pytest.mark.parametrize("content", [{"a": float("nan")}, {"a": float("inf")}, {"a": b"b"}, {"a": "\ud800"}])
def test_json_cannot_say_everything(content):
    with pytest.raises(UsageError):
        json_frame(MessageKind.HELLO, content)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b'{"a": 1}',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":' + 5000 * b"1" + b"}",
        b'{"a":' + 200_000 * b"[" + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=range(15),
)
def test_json_is_strict(body):
    with pytest.raises(Malformed):
        read_json(Frame(MessageKind.HELLO, segments=(Segment(SegmentType.JSON, body),)))


def test_json_has_a_limit():
    with pytest.raises(LimitExceeded, match="limit is 8"):
        read_json(json_frame(MessageKind.HELLO, {"a": "bcdefgh"}), Limits(max_json=8))


def test_a_short_header_has_no_prefix():
    with pytest.raises(Truncated, match="63 bytes"):
        unpack_prefix(pack(text_frame("hi"))[: HEADER_BYTES - 1])


def examples() -> list[bytes]:
    """The whole messages of the page."""
    blocks = re.findall(r"```hex\n(.*?)```", FORMAT.read_text(), re.DOTALL)
    return [bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines())) for block in blocks]


def test_the_example_of_the_format_page():
    kv = contract.cache(((1, 2, 2),), n_tokens=1)
    kv.groups[0].keys[:] = kv.groups[0].keys.new_tensor([1.0, -0.5])
    kv.groups[0].values[:] = kv.groups[0].values.new_tensor([0.0, 7.0])
    frame = CODECS.parse("int(4)").encode(kv)
    data = pack(frame)
    assert pack(replace(frame, short=True))[:24].hex(" ") in FORMAT.read_text()
    assert examples()[0].hex(" ") == data.hex(" ")
    assert decode(unpack(data), kv.geometry).groups[0].values.flatten().tolist() == [0.0, 7.0]


def test_the_example_under_ecsq():
    kv = contract.cache(((1, 2, 1),), n_tokens=4)
    keys, values = kv.groups[0].keys, kv.groups[0].values
    keys[0, 0, 0] = keys.new_tensor([[1.0, 0.5], [2.0, 0.5], [0.0, 0.5], [1.0, 0.5]])
    values[0, 0, 0] = values.new_tensor([[0.0], [3.0], [-1.0], [6.0]])
    data = pack(CODECS.parse("ecsq(step=-192, weighting=part)").encode(kv))
    assert examples()[1].hex(" ") == data.hex(" ")
    came = decode(unpack(data), kv.geometry).groups[0]
    text = FORMAT.read_text()
    for numbers in (came.keys[0, 0, 0, :, 0], came.values.flatten()):
        assert ", ".join(np.format_float_positional(x, trim="-") for x in numbers.numpy()) in text


def test_the_parts_on_the_format_page():
    few, ages = np.isin(np.arange(128), [3, 40, 90, 91]), np.ones((2, 2, 128), np.uint8)
    ages[:, :, :4], ages[:, 1, 120:] = 3, 2
    hi = pack(text_frame("hi"))
    parts = [
        write_set(np.isin(np.arange(128), [3, 4, 5, 6])),
        write_set(np.arange(5) % 2 == 0),
        write_set(few),
        write_classes(ages) or b"",
        pack(text_frame("hi"), bytes(range(16)))[-32:],
        cut(hi, 200, message_id=7)[0].removesuffix(hi),
    ]
    assert [part.hex(" ") for part in parts] == re.findall(
        r"^\| `([0-9a-f ]{5,})` \|", FORMAT.read_text(), re.M
    )
    assert write_set(~few) == b"\x0f" + write_set(few)[1:]


def test_the_format_page_names_every_segment_and_kind():
    text = FORMAT.read_text()
    for member in (*SegmentType, *MessageKind):
        assert re.search(rf"\b{member.value} {member.name}\b", text), member


LIGHT = """
import sys, time
start = time.process_time()
import kvferry.wire
print(time.process_time() - start, *sys.modules.keys() & {"torch", "numpy", "pydantic", "transformers"})
"""


def test_importing_wire_is_light():
    command = [sys.executable, "-c", LIGHT]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)
    ]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(seconds) for (seconds,) in runs) < 0.15
