"""The entropy-coded codec: the same on both paths, bounded errors, caps kept to the byte, refusal of damage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from caps import Draw, check_draw
from kvferry.codec import decode, roundtrip
from kvferry.codec.ecsq import Ecsq, layout
from kvferry.codec.ecsq.grid import LOWEST, SILENT, centre, step_size
from kvferry.codec.ecsq.weights import exponents, read_weights, write_weights
from kvferry.codec.entropy.tables import N_TABLES
from kvferry.errors import KvferryError, Malformed, NotFinite, UsageError
from kvferry.kv import KV, Plan
from kvferry.wire import DEFAULT_LIMITS, Frame, Segment, SegmentType, pack, unpack
from kvferry.wire.varint import write_varint
from paths import every_path, on_both, path

steps = st.sampled_from([-700, -200, -64, 0, 80])
weightings = st.sampled_from(["layer", "part", "frame"])
seeds = st.integers(0, 1 << 30)
recipes = contract.recipes().map(lambda recipe: replace(recipe, space="content"))


def plan_of(kv: KV, n_classes: int, seed: int) -> Plan | None:
    """Any classes, some tokens dropped."""
    if n_classes == 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = Plan.everything(kv).classes.shape
    classes = torch.randint(1, n_classes + 1, shape, generator=generator).to(torch.uint8)
    classes[:, :, torch.rand(shape[2], generator=generator) < 0.2] = 0
    return Plan(classes)


def numbers_of(kv: KV) -> list[bytes]:
    return [tensor.numpy().tobytes() for group in kv.groups for tensor in (group.keys, group.values)]


def coded(codec: Ecsq, kv: KV, plan: Plan | None) -> list[bytes]:
    """The message, what it decodes to, and what `roundtrip` says that it does."""
    data = pack(codec.encode(kv, plan))
    return [data, *numbers_of(decode(unpack(data), kv.geometry)), *numbers_of(roundtrip(codec, kv))]


@settings(max_examples=80)
@given(recipes, steps, weightings, st.sampled_from([1, 1, 2, 5]), st.sampled_from([0, 6]), seeds)
def test_both_paths_give_the_same_bytes_and_numbers(recipe, step, weighting, n_classes, part_bits, seed):
    kv = recipe.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "PART_NUMBERS", 1 << part_bits if part_bits else layout.PART_NUMBERS)
        plain, fast = on_both(lambda: coded(Ecsq(step, weighting), kv, plan_of(kv, n_classes, seed)))
    assert plain == fast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_tokens", [1, 70])
def test_both_paths_on_other_dtypes_and_more_tokens(dtype, n_tokens):
    kv = contract.cache(contract.RAGGED, n_tokens=n_tokens, seed=3)
    kv = kv.with_groups(
        tuple(replace(g, keys=g.keys.to(dtype), values=g.values.to(dtype)) for g in kv.groups)
    )
    plain, fast = on_both(lambda: coded(Ecsq(-100), kv, plan_of(kv, 3, 1)))
    assert plain == fast


@settings(max_examples=60)
@given(recipes, steps, st.sampled_from([1, 4]), seeds)
def test_every_number_is_within_a_step_of_its_original(recipe, step, n_classes, seed):
    """Within half of one from where its cell is decoded to the middle; half an octave more for each class."""
    kv = recipe.build()
    plan = plan_of(kv, n_classes, seed) or Plan.everything(kv)
    frame = Ecsq(step).encode(kv, plan)
    came = decode(frame, kv.geometry)
    weights = read_weights(frame.body(SegmentType.WEIGHTS), kv.geometry.n_layers, "layer")
    kept = (kv.present[:, 0] & (plan.classes > 0).all(1)).numpy()
    index = np.flatnonzero(kept.any(0))
    for layer in range(kv.geometry.n_layers):
        for which in (0, 1):
            held = kept[layer, index]
            original = kv.layer(layer)[which][0].numpy()[:, index][:, held].astype(np.float64)
            decoded = came.layer(layer)[which][0].numpy()[:, held].astype(np.float64)
            octaves = (plan.classes[layer, which].numpy()[index][held].astype(int) - 1) / 2
            one = float(2.0 ** (step / 64 + weights[2 * layer + which] / 8))
            most = one * 2.0 ** octaves[None, :, None] * (1 + 1e-5) + 4e-7 * np.abs(original) + 1e-44
            assert (np.abs(decoded - original) <= most).all()


def test_large_numbers_are_within_half_a_step():
    """Fine steps leave no centroids: only the four smallest magnitudes have one."""
    kv = contract.cache(n_tokens=40, seed=1)
    came = decode(Ecsq(-900, "frame").encode(kv), kv.geometry)
    weight = read_weights(Ecsq(-900, "frame").encode(kv).body(SegmentType.WEIGHTS), 3, "frame")[0]
    one = 2.0 ** (-900 / 64 + weight / 8)
    for a, b in zip(kv.groups, came.groups, strict=True):
        errors = torch.cat([(a.keys - b.keys).abs().flatten(), (a.values - b.values).abs().flatten()])
        assert float(errors.max()) <= 0.5 * one + 1e-6
        assert float(errors.mean()) == pytest.approx(one / 4, rel=0.1)


def test_a_centre_lies_in_its_cell():
    numbers = np.tile(np.arange(-6, 7), (N_TABLES + 1, 1))
    level = np.broadcast_to(np.arange(SILENT, LOWEST + N_TABLES)[:, None], numbers.shape)
    found = centre(numbers, level)
    assert (np.abs(found - numbers) <= 0.5).all()
    assert (found[0] == numbers[0]).all()
    assert (found[:, [0, 1, 2, -3, -2, -1]] == numbers[:, [0, 1, 2, -3, -2, -1]]).all()


def test_channels_that_do_not_move_cost_next_to_nothing():
    """A constant channel is silent: its mean, to half a step, and no symbols."""
    kv = contract.cache(((2, 8, 8),), n_tokens=200)
    group = kv.groups[0]
    group.values[..., 1:] = torch.arange(7.0)
    frame = Ecsq(-64).encode(kv)
    came = decode(frame, kv.geometry).groups[0]
    weight = read_weights(frame.body(SegmentType.WEIGHTS), 1, "layer")[1]
    assert float((came.values - group.values)[..., 1:].abs().max()) <= 0.5 * 2 ** (-1 + weight / 8)
    assert bool((came.values[..., 1:] == came.values[:, :, :, :1, 1:]).all())
    moving = contract.cache(((2, 8, 8),), n_tokens=200)
    assert len(pack(frame)) < 0.65 * len(pack(Ecsq(-64).encode(moving)))


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_few_tokens(n_tokens):
    kv = contract.cache(contract.RAGGED, n_tokens=n_tokens)
    came = decode(unpack(pack(Ecsq(-200).encode(kv))), kv.geometry)
    assert came.n_tokens == n_tokens
    contract.same(came, roundtrip(Ecsq(-200), kv))


@every_path
def test_outliers_are_escapes_and_beyond_the_limit_refused(compiled):
    kv = contract.cache(n_tokens=50)
    kv.groups[0].keys[1, 0, 0, 3, 2] = 3e4
    with path(compiled):
        came = decode(Ecsq(-64).encode(kv), kv.geometry)
        assert float(came.groups[0].keys[1, 0, 0, 3, 2]) == pytest.approx(3e4, rel=0.1)
        kv.groups[0].keys[1, 0, 0, 3, 2] = 3e38
        with pytest.raises(UsageError):
            Ecsq(-1024).encode(kv)
        kv.groups[0].keys[1, 0, 0, 3, 2] = float("nan")
        with pytest.raises(NotFinite, match="key at layer 1, head 0, token 3"):
            Ecsq(-64).encode(kv)


@settings(max_examples=150)
@given(st.builds(Draw, seed=seeds))
def test_caps_are_kept(draw):
    check_draw(draw)


@settings(max_examples=15)
@given(recipes, st.integers(1, 4_000))
def test_a_cap_gives_the_frame_of_some_step_and_the_finest_that_fits(recipe, spare):
    kv, codec = recipe.build(), Ecsq(-300)
    smallest = len(pack(Ecsq(1024).encode(kv)))
    frame = codec.encode(kv, max_bytes=smallest + spare)
    assert pack(frame) == pack(Ecsq(frame.step).encode(kv))
    if frame.step > codec.step:
        assert len(pack(Ecsq(frame.step - 1).encode(kv))) > smallest + spare


KV_CACHE = contract.cache(((2, 3, 4), (1, 2, 2)), n_tokens=9, seed=2)
HONEST = Ecsq(-64).encode(KV_CACHE)


def with_body(kind: SegmentType, body: bytes) -> Frame:
    """The honest frame with another body in a segment; its checksums are right."""
    segments = [Segment(kind, body) if segment.type == kind else segment for segment in HONEST.segments]
    return unpack(pack(replace(HONEST, segments=tuple(segments))))


def refused_or_decoded(frame: Frame) -> bool:
    """Whether a frame decodes; `Malformed` otherwise, and no other error."""
    try:
        came = decode(frame, KV_CACHE.geometry)
    except Malformed:
        return False
    contract.same(replace(came, groups=KV_CACHE.groups), replace(KV_CACHE, spans=came.spans))
    assert all(
        bool(tensor.isfinite().all()) and tensor.shape == other.shape
        for group, like in zip(came.groups, KV_CACHE.groups, strict=True)
        for tensor, other in ((group.keys, like.keys), (group.values, like.values))
    )
    return True


@every_path
@pytest.mark.parametrize("kind", [SegmentType.PAYLOAD, SegmentType.WEIGHTS])
def test_one_bit_flipped(compiled, kind):
    body = HONEST.body(kind)
    assert body is not None
    with path(compiled):
        for bit in range(0, 8 * len(body), 1 if compiled else 3):
            broken = bytearray(body)
            broken[bit // 8] ^= 1 << bit % 8
            refused_or_decoded(with_body(kind, bytes(broken)))


@every_path
def test_a_body_cut_or_longer_is_refused(compiled):
    for kind in (SegmentType.PAYLOAD, SegmentType.WEIGHTS):
        body = HONEST.body(kind)
        assert body is not None
        with path(compiled):
            assert not any(refused_or_decoded(with_body(kind, body[:n])) for n in range(len(body)))
            assert not any(refused_or_decoded(with_body(kind, body + bytes(n))) for n in (1, 2, 3, 10_000))


def test_fields_of_a_part_out_of_range():
    body = HONEST.body(SegmentType.PAYLOAD)
    assert body is not None
    raw = body[1]
    lies = {
        "lanes": b"\x09" + body[1:],
        "more lanes than bytes": b"\x08" + body[1:],
        "raw bytes": body[:1] + write_varint(1 << 40) + body[2:],
        "all of it raw": body[:1] + write_varint(len(body)) + body[2:],
        "raw bits left over": body[:1] + write_varint(raw + 1) + body[2:] + b"\0",
        "levels": body[:2] + b"\xff" * 12 + body[14:],
    }
    assert raw < 127
    for name, lie in lies.items():
        assert not refused_or_decoded(with_body(SegmentType.PAYLOAD, lie)), name


@pytest.mark.parametrize("weights", [[0], [0, 0, 0, 1025], [-1025, 0, 0, 0], [0] * 5, [1 << 33] * 4])
def test_weights_out_of_range(weights):
    with pytest.raises(Malformed, match="weights"):
        decode(with_body(SegmentType.WEIGHTS, write_weights(weights)), KV_CACHE.geometry)


@pytest.mark.parametrize("step", [-1025, 1025, -(1 << 15), (1 << 15) - 1])
def test_a_step_out_of_range(step):
    with pytest.raises(KvferryError):
        decode(unpack(pack(replace(HONEST, step=step))), KV_CACHE.geometry)


def test_parts_that_are_missing_or_too_many():
    payload = next(segment for segment in HONEST.segments if segment.type == SegmentType.PAYLOAD)
    others = tuple(segment for segment in HONEST.segments if segment.type != SegmentType.PAYLOAD)
    for bodies in ((), (payload, payload), (payload, Segment(SegmentType.PAYLOAD, b""))):
        with pytest.raises(Malformed, match="part"):
            decode(replace(HONEST, segments=(*others, *bodies)), KV_CACHE.geometry, DEFAULT_LIMITS)


def test_exponents_follow_the_weights():
    manifest_blocks = [layout.Block(1, which, 2, 3, {1: np.arange(4)}) for which in (0, 1)]
    assert exponents(manifest_blocks, [1, 2, 3, 4], "layer").tolist() == [24] * 6 + [32] * 6
    assert exponents(manifest_blocks, [1, 2], "part").tolist() == [8] * 6 + [16] * 6
    assert exponents(manifest_blocks, [5], "frame").tolist() == [40] * 12


def test_steps_are_powers_of_two_to_the_bit():
    exponent = np.arange(-9_000, 5_700)
    exact = 2.0 ** (exponent / 64)
    assert (step_size(exponent) == exact.astype(np.float32)).mean() > 0.99
    assert np.allclose(step_size(exponent), exact, rtol=1e-7, atol=1e-45)
