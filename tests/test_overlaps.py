"""The receiver's token grid on the wire: three bits a token, in one form, where the header says so and only there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
import reference
from kvferry.codec import CODECS, decode, roundtrip
from kvferry.codec.segments import read_overlaps, write_overlaps
from kvferry.errors import CacheError, KvferryError, Malformed
from kvferry.kv import KV, Plan
from kvferry.session.cache_file import load_cache, save_cache
from kvferry.session.survey import survey
from kvferry.wire import Frame, Segment, SegmentType, TokenGrid, pack, unpack
from reference_frame import Refused, read_frame, read_overlaps_of
from specs import SPECS

every_spec = pytest.mark.parametrize("spec", SPECS)


def on_the_grid(kv: KV, seed: int = 0) -> KV:
    """The same cache, its tokens in any classes."""
    random = np.random.default_rng(seed)
    rows = (replace(row, overlap=random.integers(0, 8, len(row)).astype(np.uint8)) for row in kv.spans)
    return replace(kv, spans=tuple(rows))


KV_CACHE = on_the_grid(contract.cache(((1, 3, 2), (2, 4, 1)), n_tokens=9))
FRAME = CODECS.parse("int(4)").encode(KV_CACHE)


def classes(kv: KV) -> list[int]:
    (row,) = kv.spans
    assert row.overlap is not None
    return row.overlap.tolist()


def with_overlaps(frame: Frame, body: bytes | None) -> Frame:
    others = tuple(segment for segment in frame.segments if segment.type != SegmentType.OVERLAPS)
    mine = () if body is None else (Segment(SegmentType.OVERLAPS, body),)
    return replace(frame, segments=tuple(sorted((*others, *mine), key=lambda segment: segment.type)))


@every_spec
@given(recipe=contract.recipes(), seed=st.integers(0, 1 << 20))
@settings(max_examples=6)
def test_classes_travel_with_every_codec(spec, recipe, seed):
    """And nothing else is changed: the numbers are those of the sender's grid."""
    codec = CODECS.parse(spec)
    plain = contract.taken(codec, next(recipe.build().sequences()))
    kv = on_the_grid(plain, seed)
    frame = unpack(pack(codec.encode(kv)))
    assert frame.grid == TokenGrid.RECEIVER
    got = decode(frame, kv.geometry)
    assert classes(got) == classes(kv)
    contract.same(got, contract.over_the_wire(codec, plain))
    contract.check_canonical(codec, kv)
    contract.check_batched_equals_single(codec, kv)
    assert roundtrip(codec, kv).spans == kv.spans


@every_spec
def test_the_senders_grid_has_neither_segment_nor_bit(spec):
    plain = contract.cache(((1, 3, 2), (2, 4, 1)), n_tokens=9)
    frame = CODECS.parse(spec).encode(plain)
    assert frame.grid == TokenGrid.SENDER and frame.body(SegmentType.OVERLAPS) is None
    assert decode(unpack(pack(frame)), plain.geometry).spans[0].overlap is None


def test_three_bits_a_token_are_counted():
    n_bytes = len(pack(FRAME)) - len(
        pack(CODECS.parse("int(4)").encode(contract.cache(((1, 3, 2), (2, 4, 1)), 9)))
    )
    assert n_bytes == 7 + 4, "head, and 27 bits"
    assert len(pack(CODECS.parse("int(4)").encode(KV_CACHE, max_bytes=len(pack(FRAME))))) == len(pack(FRAME))
    contract.check_cap(CODECS.parse("int(4)"), KV_CACHE)


def test_packed_by_hand():
    """Class i is bits 3 i to 3 i + 2, lowest first: 1 2 3 7 makes 1 + 2*8 + 3*64 + 7*512."""
    body = write_overlaps(np.array([1, 2, 3, 7], np.uint8))
    assert body == (1 + 2 * 8 + 3 * 64 + 7 * 512).to_bytes(2, "little")
    assert read_overlaps(body, 4).tolist() == [1, 2, 3, 7]
    assert write_overlaps(None) is None and read_overlaps(None, 4) is None


def test_dropped_tokens_take_their_classes_along():
    plan = Plan.everything(KV_CACHE)
    plan.classes[:, :, [0, 4]] = 0
    got = decode(CODECS.parse("int(4)").encode(KV_CACHE, plan), KV_CACHE.geometry)
    assert classes(got) == [number for index, number in enumerate(classes(KV_CACHE)) if index not in (0, 4)]


@every_spec
def test_no_tokens_are_on_the_grid_too(spec):
    codec, empty = CODECS.parse(spec), on_the_grid(contract.cache(n_tokens=0))
    frame = unpack(pack(codec.encode(empty)))
    assert frame.grid == TokenGrid.RECEIVER and frame.body(SegmentType.OVERLAPS) == b""
    assert classes(decode(frame, empty.geometry)) == []


# What is refused


def refused(frame: Frame) -> None:
    with pytest.raises(Malformed):
        decode(unpack(pack(frame)), KV_CACHE.geometry)


@pytest.mark.parametrize("spec", ["int(4)", "raw", "ecsq"])
def test_header_and_segment_must_agree(spec):
    frame = CODECS.parse(spec).encode(KV_CACHE)
    refused(replace(frame, grid=TokenGrid.SENDER))
    refused(with_overlaps(frame, None))
    both_gone = replace(with_overlaps(frame, None), grid=TokenGrid.SENDER)
    assert decode(unpack(pack(both_gone)), KV_CACHE.geometry).spans[0].overlap is None


BODY = FRAME.body(SegmentType.OVERLAPS) or b""


@pytest.mark.parametrize("length", [0, 1, len(BODY) - 1, len(BODY) + 1, len(BODY) + 100])
def test_another_length_is_refused(length):
    refused(with_overlaps(FRAME, (BODY + bytes(100))[:length]))


@pytest.mark.parametrize("bit", range(27, 32))
def test_bits_behind_the_last_class_are_zero(bit):
    number = int.from_bytes(BODY, "little") | 1 << bit
    refused(with_overlaps(FRAME, number.to_bytes(4, "little")))


def test_one_segment_only():
    twice = tuple(s for s in FRAME.segments for _ in range(1 + (s.type == SegmentType.OVERLAPS)))
    refused(replace(FRAME, segments=twice))


@given(body=st.binary(max_size=6), n_tokens=st.integers(0, 16))
def test_any_body_is_read_to_what_writes_it_or_refused(body, n_tokens):
    try:
        found = read_overlaps(body, n_tokens)
    except Malformed:
        return
    assert found is not None and write_overlaps(found) == body


# The second decoder


@given(recipe=contract.recipes(), seed=st.integers(0, 1 << 20))
@settings(max_examples=25)
def test_the_page_alone_is_enough_to_read_them(recipe, seed):
    kv = on_the_grid(next(replace(recipe, space="content").build().sequences()), seed)
    data = pack(CODECS.parse("ecsq").encode(kv))
    assert read_overlaps_of(read_frame(data)) == classes(kv)
    found = reference.decode(data)
    for (layer, which), numbers in found.items():
        wanted = decode(unpack(data), kv.geometry).layer(layer)[which][0]
        assert numbers.tobytes() == wanted.contiguous().numpy().tobytes()
    plain = replace(kv, spans=tuple(replace(row, overlap=None) for row in kv.spans))
    assert read_overlaps_of(read_frame(pack(CODECS.parse("ecsq").encode(plain)))) is None


@pytest.mark.parametrize("body", [None, b"", BODY[:-1], BODY + b"\0", BODY[:-1] + b"\xff", BODY])
@pytest.mark.parametrize("grid", TokenGrid)
def test_both_decoders_refuse_the_same(grid, body):
    frame = replace(with_overlaps(CODECS.parse("ecsq").encode(KV_CACHE), body), grid=grid)
    data = pack(frame)
    try:
        decode(unpack(data), KV_CACHE.geometry)
    except KvferryError:
        with pytest.raises(Refused):
            reference.decode(data)
    else:
        assert reference.decode(data) and body == (BODY if grid == TokenGrid.RECEIVER else None)


# Files


def test_a_file_of_tensors_keeps_the_grid(tmp_path):
    save_cache(KV_CACHE, tmp_path / "a")
    again = load_cache(tmp_path / "a", KV_CACHE.geometry)
    contract.same(again, KV_CACHE)
    assert classes(again) == classes(KV_CACHE)
    assert pack(CODECS.parse("int(4)").encode(again)) == pack(FRAME)
    save_cache(contract.cache(n_tokens=3), tmp_path / "b")
    assert load_cache(tmp_path / "b", contract.geometry()).spans[0].overlap is None


@pytest.mark.parametrize("number", [8, 255])
def test_a_file_with_other_classes_is_refused(tmp_path, number):
    (row,) = KV_CACHE.spans
    wrong = replace(row, overlap=np.full(len(row), number, np.uint8))
    save_cache(replace(KV_CACHE, spans=(wrong,)), tmp_path / "a")
    with pytest.raises(CacheError, match=f"overlap class {number}"):
        load_cache(tmp_path / "a", KV_CACHE.geometry)


def test_inspect_counts_them():
    found, error = survey(pack(FRAME))
    assert error is None
    (row,) = (row for row in found.segments if row.name == "OVERLAPS")
    assert row.body_bytes == 4 and found.header is not None and found.header.grid == "receiver"
    assert torch.equal(KV_CACHE.present, torch.ones_like(KV_CACHE.present))
