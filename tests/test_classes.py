"""Sets of tokens and their precision classes: each in its shortest form, in one form only, and bounded."""

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from attacks import forge
from kvferry.codec.classes import read_classes, write_classes
from kvferry.codec.manifest import Uses, kv_frame, manifest_of, read_manifest
from kvferry.codec.sets import read_set, write_set
from kvferry.errors import ForeignProfile, KvferryError, Malformed, UsageError
from kvferry.kv import Plan
from kvferry.wire import DEFAULT_LIMITS, FrameType, Segment, SegmentType

quick = settings(max_examples=60, deadline=None)
SETS = st.integers(0, 70).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n))


def bits(*parts: str) -> bytes:
    """Bits as they are written, first to last, into bytes: lowest first, zeros behind."""
    text = "".join(parts)
    return bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))


def gaps(members, k: int) -> bytes:
    """The Rice form by the letter of docs/format.md."""
    steps = [b - a - 1 for a, b in zip([-1, *members], members, strict=False)]
    low = ["".join(str(g >> bit & 1) for bit in range(k)) for g in steps]
    return forge.varint(len(steps)) + bits(*low, *("0" * (g >> k) + "1" for g in steps))


def shortest(row) -> bytes:
    """Every way to write a set, slowly, and the first of the shortest."""
    members = [i for i, held in enumerate(row) if held]
    others = [i for i, held in enumerate(row) if not held]
    start, stop = (members[0], members[-1] + 1) if members else (0, 0)
    is_range = stop - start == len(members)
    forms = [b"\0" + forge.varint(start) + forge.varint(stop - start)] if is_range else []
    forms.append(b"\1" + bits("".join(str(int(held)) for held in row)))
    for mode, chosen in ((2, members), (3, others)):
        forms += [forge.varint(mode + 4 * k) + gaps(chosen, k) for k in range(12)]
    return min(forms, key=len)


@quick
@given(row=SETS)
def test_a_set_is_written_the_shortest_way_and_comes_back(row):
    mask = np.array(row, bool)
    body = write_set(mask)
    assert body == shortest(row)
    came, end = read_set(memoryview(body + b"tail"), 0, len(row))
    assert (came.tolist(), end) == (row, len(body))


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50, 999, 2000])
@pytest.mark.parametrize("most", [False, True])
def test_large_sets(every, most):
    mask = (np.arange(3001) % every == 0) ^ most
    body = write_set(mask)
    assert np.array_equal(read_set(memoryview(body), 0, 3001)[0], mask)
    assert len(body) <= 1 + 376


def test_sparse_sets_cost_their_gaps():
    chosen = np.zeros(100_000, bool)
    chosen[np.random.default_rng(0).choice(100_000, 1000, replace=False)] = True
    assert len(write_set(chosen)) < 1.03 * 1000 * 8.1 / 8  # entropy: 8.08 bits for each
    assert len(write_set(~chosen)) == len(write_set(chosen))


@quick
@given(body=st.binary(max_size=12), n=st.integers(0, 40))
def test_any_bytes_are_a_set_or_refused(body, n):
    try:
        row, end = read_set(memoryview(body), 0, n)
    except Malformed:
        return
    assert len(row) == n
    assert end <= len(body)


@st.composite
def class_arrays(draw):
    n_layers, n_tokens = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    numbers = st.sampled_from(draw(st.lists(st.integers(1, 15), min_size=1, max_size=4)))
    rows = st.lists(numbers, min_size=n_tokens, max_size=n_tokens)
    pool = draw(st.lists(st.tuples(rows, rows), min_size=1, max_size=2))
    pool = [*pool, (pool[0][0], pool[0][0])]
    layers = [draw(st.sampled_from(pool)) for _ in range(n_layers)]
    held = [[draw(st.booleans()) for _ in range(n_tokens)] for _ in range(draw(st.integers(1, 2)))]
    present = np.array([draw(st.sampled_from(held)) for _ in range(n_layers)], bool)
    classes = np.array(layers, np.uint8).reshape(n_layers, 2, n_tokens)
    return np.where(present[:, None], classes, np.uint8(0)), present


@quick
@given(arrays=class_arrays())
def test_classes_come_back(arrays):
    classes, present = arrays
    body = write_classes(classes)
    came = read_classes(body, present)
    assert np.array_equal(came, classes)
    assert write_classes(came) == body
    assert (body is None) == bool((classes <= 1).all())


@quick
@given(arrays=class_arrays(), body=st.binary(max_size=20))
def test_any_bytes_are_classes_or_refused(arrays, body):
    present = arrays[1]
    try:
        came = read_classes(body, present)
    except Malformed:
        return
    assert np.array_equal(came > 0, np.repeat(present[:, None], 2, axis=1))
    assert came.max(initial=0) <= 15


def test_ages_cost_a_few_bytes():
    """Two borders in 4,096 tokens, the same in 24 layers for keys and values."""
    ages = np.repeat([3, 2, 1], [4, 92, 4000]).astype(np.uint8)
    assert len(write_classes(np.broadcast_to(ages, (24, 2, 4096))) or b"") == 9


PRESENT = np.array([[True, True, True], [True, False, True]])
BODIES = {
    "cut behind the count": b"\1",
    "cut behind a mask": b"\1\6",
    "cut behind the keys": b"\1\6\2\1\1",
    "one layer of two": b"\1\6\0\2\1\1",
    "no layers": b"\0\6\0\2\1\1",
    "three layers": b"\3\2\1",
    "2**60 layers": forge.varint(2**60) + b"\2\1",
    "layers that hold other tokens": b"\2\2\1",
    "class 0": b"\1\3\0\2\1\1\1\2\1",
    "keys as the keys": b"\1\1\1\1\2\1",
    "class 16": b"\1" + forge.varint(1 << 16) + b"\1\1\2\1",
    "no class for tokens": b"\1\0\1\1\2\1",
    "a third layer": b"\1\2\1\1\2\1\1\2\1",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_classes_that_do_not_fit_are_refused(body):
    with pytest.raises(Malformed):
        read_classes(body, PRESENT)


def test_a_class_for_no_tokens_is_refused():
    with pytest.raises(Malformed):
        read_classes(b"\1\2\1", np.zeros((1, 3), bool))


KV = contract.cache(contract.RAGGED, n_tokens=6)
N_LAYERS = KV.geometry.n_layers
CLASSES = Plan.everything(KV).classes
CLASSES[:, 1, 2:] = 2
FINE = Uses(step=True, classes=True, weights=True, profile_hash=7)


def framed(classes=CLASSES, *extra: Segment, **fields):
    manifest = manifest_of(KV, (CLASSES > 0).all(1), classes)
    return kv_frame(KV.geometry, manifest.n_tokens, (*manifest.segments(), *extra), **fields)


def read(frame, uses=FINE):
    return read_manifest(frame, KV.geometry, DEFAULT_LIMITS, uses)


def test_a_manifest_carries_classes_weights_step_and_profile():
    frame = framed(CLASSES, Segment(SegmentType.WEIGHTS, b"w"), step=-5, profile_hash=7)
    assert np.array_equal(read(frame).classes, CLASSES.numpy())
    assert frame.step == -5


def test_classes_are_those_of_kept_tokens():
    keep = torch.zeros(N_LAYERS, 6, dtype=torch.bool)
    keep[:, 3:] = True
    manifest = manifest_of(KV, keep, CLASSES)
    assert np.array_equal(manifest.classes, CLASSES[..., 3:].numpy())


def test_classes_of_one_are_not_written():
    frame = framed(torch.ones_like(CLASSES), profile_hash=7)
    assert frame.body(SegmentType.CLASSES) is None
    assert (read(frame).classes == 1).all()
    assert read(replace(frame, profile_hash=0), Uses()).classes is None


def test_a_plan_of_class_16_is_refused():
    with pytest.raises(UsageError, match="value of token 2 is in class 16"):
        framed(CLASSES * 8)


REFUSED = {
    "another profile": ({"profile_hash": 8}, FINE, ForeignProfile, "0000000000000008.*0000000000000007"),
    "no profile": ({}, FINE, ForeignProfile, "no profile.*0000000000000007"),
    "a profile for none": (
        {"profile_hash": 7},
        replace(FINE, profile_hash=0),
        ForeignProfile,
        "holds no profile",
    ),
    "classes": ({"profile_hash": 7}, replace(FINE, classes=False), Malformed, "CLASSES"),
    "a step": ({"profile_hash": 7, "step": 1}, replace(FINE, step=False), Malformed, "step 1"),
}


@pytest.mark.parametrize(("fields", "uses", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_codec_does_not_use_is_refused(fields, uses, error, words):
    with pytest.raises(error, match=words):
        read(framed(**fields), uses)


def test_a_p_frame_is_refused():
    frame = replace(framed(profile_hash=7), frame_type=FrameType.P, frame_id=1)
    with pytest.raises(Malformed, match="type P"):
        read(frame)


def test_mutated_manifests_are_refused_or_mean_what_they_say():
    """Checksums play no part here: what is read is hostile, not damaged."""
    chance = random.Random(0)
    classes = torch.from_numpy(np.random.default_rng(0).integers(1, 5, tuple(CLASSES.shape), np.uint8))
    honest = framed(classes, profile_hash=7)
    n_read = 0
    for _ in range(400):
        segments = list(honest.segments)
        at = chance.randrange(len(segments))
        body = bytearray(segments[at].body)
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        segments[at] = replace(segments[at], body=bytes(body))
        try:
            manifest = read(replace(honest, segments=tuple(segments)))
        except KvferryError:
            continue
        n_read += 1
        assert manifest.segments() == tuple(segments)
    assert 0 < n_read < 400


def test_classes_have_one_form():
    """Layers joined or not, values as keys or spelled out: only the writer's form is read."""
    honest = framed(torch.full_like(CLASSES, 3), profile_hash=7)
    assert honest.body(SegmentType.CLASSES) == bytes([N_LAYERS, 8, 1])
    others = tuple(s for s in honest.segments if s.type != SegmentType.CLASSES)
    for body in (bytes([N_LAYERS, 8, 8]), N_LAYERS * b"\1\10\1", bytes([N_LAYERS, 2, 1]), b""):
        frame = replace(honest, segments=(*others, Segment(SegmentType.CLASSES, body)))
        with pytest.raises(Malformed):
            read(frame)


N = 1 << 20
HOSTILE = {
    "as many gaps as tokens": forge.varint(2) + forge.varint(N) + b"\xff" * 16,
    "gaps of the largest parameter": forge.varint(2 + 4 * 30) + forge.varint(N) + b"\xff" * 16,
    "a gap over all tokens": forge.varint(2) + forge.varint(1) + bytes(N // 8 + 9),
    "2**40 gaps": forge.varint(2) + forge.varint(2**40) + bytes(99),
    "a range of 2**40": forge.varint(0) + forge.varint(0) + forge.varint(2**40),
    "a range from 2**62": forge.varint(0) + forge.varint(2**62) + forge.varint(2**62),
    "a bitmap that is cut": b"\1" + bytes(N // 8 - 1),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_memory_of_a_set_follows_the_tokens(body):
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            read_set(memoryview(body), 0, N)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 20 * N
    finally:
        tracemalloc.stop()


def test_a_row_that_is_the_last_whole_one_moved_is_one_byte():
    row = np.array([1, 4, 4, 9, 0, 13], np.uint8)
    moved = np.where(row > 0, np.minimum(row + 3, 15), 0).astype(np.uint8)
    back = np.where(row > 0, np.maximum(row.astype(int) - 2, 1), 0).astype(np.uint8)
    classes = np.array([[row, moved], [back, row]])
    body = write_classes(classes)
    assert body is not None
    assert body[-4:] == bytes([1 + 2 * 6, 1, 1 + 2 * 3, 1])
    assert np.array_equal(read_classes(body, classes[:, 0] > 0), classes)


def test_the_moved_row_is_that_of_the_last_whole_one_and_not_of_a_moved_one():
    row = np.array([1, 4, 9], np.uint8)
    dead = np.full(3, 15, np.uint8)
    classes = np.array([[row, dead], [row, row]])
    body = write_classes(classes)
    assert body is not None
    assert np.array_equal(read_classes(body, np.ones((2, 3), bool)), classes)


@pytest.mark.parametrize("body", ["010302", "01020f1f", "0102010103", "010301"])
def test_a_row_moved_too_far_or_from_nowhere_is_refused(body):
    with pytest.raises(Malformed):
        read_classes(bytes.fromhex(body), np.ones((1, 3), bool))
