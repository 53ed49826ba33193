"""The second decoder, written from the page, agrees with the first to the bit and refuses what it refuses."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
import reference
from golden.caches import CACHES
from kvferry.codec import decode
from kvferry.codec.ecsq import Ecsq, layout
from kvferry.codec.profile import save_profile
from kvferry.errors import KvferryError
from kvferry.kv import KV, Plan
from kvferry.wire import Segment, SegmentType, pack, unpack
from profiles import held_profile
from reference_frame import Refused

GOLDEN = Path(__file__).parent / "golden"
recipes = contract.recipes().map(lambda recipe: replace(recipe, space="content"))
seeds = st.integers(0, 1 << 30)


def agree(data: bytes, like: KV, profile: reference.Fitted | None = None) -> None:
    """Both decoders give the same numbers, to the bit."""
    kv, found = decode(unpack(data), like.geometry), reference.decode(data, profile)
    for (layer, which), numbers in found.items():
        assert numbers.tobytes() == kv.layer(layer)[which][0].contiguous().numpy().tobytes(), (layer, which)


def plan_of(kv: KV, n_classes: int, seed: int) -> Plan:
    """Any classes, some tokens dropped."""
    generator = torch.Generator().manual_seed(seed)
    shape = Plan.everything(kv).classes.shape
    classes = torch.randint(1, n_classes + 1, shape, generator=generator).to(torch.uint8)
    classes[:, :, torch.rand(shape[2], generator=generator) < 0.2] = 0
    return Plan(classes)


def fitted(kv: KV, folder: Path) -> tuple[str, reference.Fitted]:
    """A profile by name, and as the second decoder reads it."""
    profile = held_profile(kv.geometry)
    save_profile(profile, folder / "a.safetensors")
    return profile.name, reference.read_profile(folder / "a.safetensors")


@settings(max_examples=60)
@given(
    recipes,
    st.sampled_from([-900, -300, -64, 0, 80, 900]),
    st.sampled_from(["layer", "part", "frame"]),
    st.sampled_from([1, 2, 15]),
    st.sampled_from([0, 5]),
    seeds,
)
def test_both_decoders_agree(recipe, step, weighting, n_classes, part_bits, seed):
    kv = recipe.build()
    with pytest.MonkeyPatch.context() as patch:
        if part_bits:
            patch.setattr(layout, "PART_NUMBERS", 1 << part_bits)
            patch.setattr(reference, "PART_NUMBERS", 1 << part_bits)
        agree(pack(Ecsq(step, weighting).encode(kv, plan_of(kv, n_classes, seed))), kv)


@pytest.mark.parametrize("n_tokens", [63, 64, 200])
@pytest.mark.parametrize("step", [-500, -64])
def test_they_agree_on_more_tokens_lanes_and_escapes(n_tokens, step):
    """Fine levels begin at 64 tokens, several lanes at 800 bytes; one number is far out."""
    kv = contract.cache(((2, 4, 6), (1, 3, 3)), n_tokens=n_tokens, seed=1)
    kv.groups[0].keys[0, 0, 0, 3, 2] = -3e4
    kv.groups[1].values[0, 0, 0, 5, 1] = 1e6
    agree(pack(Ecsq(step).encode(kv, plan_of(kv, 3, 1))), kv)


@settings(max_examples=20)
@given(recipes, st.sampled_from([-300, -64, 40]), st.sampled_from([1, 4]), seeds)
def test_they_agree_with_a_profile(recipe, step, n_classes, seed):
    kv = replace(recipe, scale=min(recipe.scale, 1.0)).build()
    with TemporaryDirectory() as folder:
        name, profile = fitted(kv, Path(folder))
        agree(pack(Ecsq(step, profile=name).encode(kv, plan_of(kv, n_classes, seed))), kv, profile)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("ecsq*.kvw")))
def test_they_agree_on_the_goldens(name, tmp_path):
    cache = next((one for one in CACHES if name.endswith(one)), "small")
    kv, _ = CACHES[cache]()
    frame = unpack((GOLDEN / f"{name}.kvw").read_bytes())
    agree(pack(frame), kv, fitted(kv, tmp_path)[1] if frame.profile_hash else None)


KV_CACHE = contract.cache(((2, 3, 4), (1, 2, 2)), n_tokens=9, seed=2)
KV_CACHE.groups[0].keys[0, 0, 0, 3, 2] = 500
HONEST = Ecsq(-64).encode(KV_CACHE, plan_of(KV_CACHE, 3, 1))


def refused(data: bytes) -> bool:
    """Whether both decoders refuse it; they agree otherwise."""
    try:
        decode(unpack(data), KV_CACHE.geometry)
    except KvferryError:
        with pytest.raises(Refused):
            reference.decode(data)
        return True
    agree(data, KV_CACHE)
    return False


def changed(kind: SegmentType, body: bytes) -> bytes:
    """The honest message with another body in a segment; its checksums are right."""
    segments = [Segment(kind, body) if segment.type == kind else segment for segment in HONEST.segments]
    return pack(replace(HONEST, segments=tuple(segments)))


@pytest.mark.parametrize("kind", [SegmentType.WEIGHTS, SegmentType.PAYLOAD])
def test_both_refuse_the_same(kind):
    """Every bit flipped, cut at every byte, bytes behind the end."""
    body = HONEST.body(kind) or b""
    flipped = [bytearray(body) for _ in range(8 * len(body))]
    for bit, one in enumerate(flipped):
        one[bit // 8] ^= 1 << bit % 8
    said = [refused(changed(kind, bytes(one))) for one in flipped]
    assert kind == SegmentType.WEIGHTS or all(said[:8]), "lanes"
    assert not all(said) or kind == SegmentType.PAYLOAD
    assert all(refused(changed(kind, body[:length])) for length in range(len(body)))
    assert all(refused(changed(kind, body + bytes(n))) for n in (1, 2, 10_000))


@pytest.mark.parametrize("step", [-1025, 1025, 5000])
def test_both_refuse_steps_out_of_range(step):
    assert refused(pack(replace(HONEST, step=step)))


ODD_WEIGHTS = {
    "fewest": b"\xff\x0f" * 4,
    "below": b"\x81\x10" * 4,
    "above": b"\x82\x10" * 4,
    "step beyond 2**88": b"\x80\x10" * 4,
    "needless bytes": b"\x80\x00" * 4,
    "too few": b"\x00" * 3,
    "too many": b"\x00" * 5,
}


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_both_refuse_weights(name):
    assert refused(changed(SegmentType.WEIGHTS, ODD_WEIGHTS[name])) == (name != "fewest")


def test_both_refuse_rotated_keys():
    shape = HONEST.body(SegmentType.SHAPE) or b""
    assert refused(changed(SegmentType.SHAPE, b"\x01" + shape[1:]))


def test_both_refuse_another_profile(tmp_path):
    assert refused(pack(replace(HONEST, profile_hash=1)))
    name, profile = fitted(KV_CACHE, tmp_path)
    frame = Ecsq(-64, profile=name).encode(KV_CACHE)
    agree(pack(frame), KV_CACHE, profile)
    weights = replace(frame, segments=(*frame.segments, Segment(SegmentType.WEIGHTS, b"\0")))
    with pytest.raises(KvferryError):
        decode(weights, KV_CACHE.geometry)
    with pytest.raises(Refused):
        reference.decode(pack(weights), profile)
