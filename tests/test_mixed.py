"""Fixed-rate codecs side by side: each token as its own codec codes it, at exactly the bytes that were promised."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from kvferry.codec import CODECS, decode, fast, integer_fast, roundtrip
from kvferry.codec.mixed import SCHEMES
from kvferry.codec.offer import Offering
from kvferry.errors import BadSpec, BudgetTooSmall, Malformed, NotFinite, UsageError
from kvferry.kv import Plan
from kvferry.wire import Segment, SegmentType, pack, unpack

MIXED = CODECS.parse("mixed(group=4)")
ALONE = {
    "fp16": "raw(float16)",
    **{f"int{bits}": f"int({bits}, group=4)" for bits in (8, 6, 4, 3, 2)},
}
quick = settings(max_examples=15, deadline=None)
plans = st.tuples(contract.recipes(), st.integers(0, 1 << 30))


def made(drawn):
    """A cache and any classes of its slots, keys and values apart."""
    recipe, seed = drawn
    kv, generator = recipe.build(), torch.Generator().manual_seed(seed)
    classes = torch.randint(1, 7, (kv.geometry.n_layers, 2, kv.n_tokens), generator=generator)
    classes *= torch.rand((kv.geometry.n_layers, 1, kv.n_tokens), generator=generator) > 0.2
    return kv, Plan(classes.to(torch.uint8))


def check_each_slot_is_coded_by_its_scheme(kv, plan):
    came = decode(unpack(pack(MIXED.encode(kv, plan))), kv.geometry)
    kept = (plan.classes[:, 0] > 0) & kv.present[:, 0]
    slots = kept.any(0).nonzero().flatten()
    assert torch.equal(came.present[:, 0], kept[:, slots])
    wanted = [roundtrip(CODECS.parse(ALONE[name]), kv) for name in SCHEMES]
    for layer in range(kv.geometry.n_layers):
        for which in (0, 1):
            row = (plan.classes[layer, which] * kept[layer])[slots]
            for token, token_class in enumerate(row.tolist()):
                got = came.layer(layer)[which][0, :, token]
                want = torch.zeros_like(got)
                if token_class:
                    want = wanted[token_class - 1].layer(layer)[which][0, :, slots[token]]
                assert torch.equal(got, want)


@quick
@given(plans)
def test_each_slot_is_what_its_own_codec_makes_of_it(drawn):
    check_each_slot_is_coded_by_its_scheme(*made(drawn))


@pytest.mark.skipif(not fast.available(), reason="numba is not installed")
def test_compiled_loops_write_the_same(monkeypatch):
    kv = contract.cache(contract.RAGGED, n_tokens=11)
    plan = Plan(torch.arange(4 * 2 * 11).reshape(4, 2, 11).remainder(6).add(1).to(torch.uint8))
    slow = pack(MIXED.encode(kv, plan))
    monkeypatch.setattr(integer_fast, "SMALLEST", 1)
    assert pack(MIXED.encode(kv, plan)) == slow
    check_each_slot_is_coded_by_its_scheme(kv, plan)


@quick
@given(plans)
def test_the_size_is_known_without_coding_and_a_cap_is_exact(drawn):
    kv, plan = made(drawn)
    size = len(pack(MIXED.encode(kv, plan)))
    assert MIXED.smallest(kv, plan) == size
    assert len(pack(MIXED.encode(kv, plan, max_bytes=size))) == size
    with pytest.raises(BudgetTooSmall) as caught:
        MIXED.encode(kv, plan, max_bytes=size - 1)
    assert caught.value.smallest_bytes == size


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_one_scheme_alone_is_the_codec_itself(bits):
    kv = contract.cache(contract.RAGGED)
    alone, mixed = CODECS.parse(f"int({bits})").encode(kv), CODECS.parse(f"mixed(int{bits})").encode(kv)
    assert alone.bodies(SegmentType.PAYLOAD) == mixed.bodies(SegmentType.PAYLOAD)
    assert abs(len(pack(alone)) - len(pack(mixed))) < 20
    contract.same(decode(mixed, kv.geometry), decode(alone, kv.geometry))


@quick
@given(contract.recipes())
def test_the_menu_is_what_coding_everything_in_a_class_costs_and_loses(recipe):
    kv = recipe.build()
    menu = MIXED.menu(kv)
    assert isinstance(MIXED, Offering)
    assert menu.classes == (1, 2, 3, 4, 5, 6)
    for token_class, name in enumerate(SCHEMES, start=1):
        alone = CODECS.parse(ALONE[name])
        came = roundtrip(alone, kv)
        for layer in range(kv.geometry.n_layers):
            held = kv.present[layer, 0]
            for which, dim in enumerate((kv.layer(layer)[0].shape[-1], kv.layer(layer)[1].shape[-1])):
                error, bits = (part[layer][token_class - 1, which] for part in (menu.error, menu.bits))
                lost = (kv.layer(layer)[which] - came.layer(layer)[which])[0].square().sum(-1)
                assert torch.equal(error, torch.where(held, lost, 0.0))
                size = alone.block_bytes(len(error), int(held.sum()), dim)
                assert 0 <= 8 * size - float(bits.sum()) < 8
                assert not bool(bits[:, ~held].any())


def test_later_classes_are_smaller_and_lose_more():
    menu = CODECS.parse("mixed").menu(contract.cache(((2, 64, 64),) * 2, n_tokens=9))
    for error, bits in zip(menu.error, menu.bits, strict=True):
        assert bool((error.sum(-1).diff(dim=0) > 0).all())
        assert bits[:, 0, 0, 0].tolist() == [1024.0, 544.0, 416.0, 288.0, 224.0, 160.0]


def test_what_is_infinite_in_fp16_is_refused_there_and_an_infinite_loss():
    kv = contract.cache(contract.RAGGED)
    kv.groups[0].keys[0, 0, 1, 3] = 1e6
    with pytest.raises(NotFinite, match="float16"):
        MIXED.encode(kv)
    menu = MIXED.menu(kv)
    assert menu.error[0].isinf().nonzero().tolist() == [[0, 0, 1, 3]]
    plan = Plan.everything(kv)
    plan.classes[0, 0, 3] = 2
    assert decode(MIXED.encode(kv, plan), kv.geometry).n_tokens == kv.n_tokens


def test_a_class_without_a_scheme_is_refused_on_both_sides():
    kv = contract.cache(contract.RAGGED)
    plan = Plan.everything(kv)
    plan.classes[1, 1, 2] = 3
    with pytest.raises(UsageError, match="classes 1 to 2"):
        CODECS.parse("mixed(int8_int4)").encode(kv, plan)
    frame = CODECS.parse("mixed(int8_int4_int2)").encode(kv, plan)
    spec = Segment(SegmentType.SPEC, b"mixed(schemes=int8_int4)")
    with pytest.raises(Malformed, match="class 3"):
        decode(replace(frame, segments=(spec, *frame.segments[1:])), kv.geometry)


@pytest.mark.parametrize("schemes", ["int8_fp16", "int8_int8", "int5", "int8__int4", "raw", "_int8", "int8_"])
def test_schemes_go_from_fine_to_coarse(schemes):
    with pytest.raises(BadSpec):
        CODECS.parse(f"mixed({schemes})")


def test_errors_name_layer_head_and_token_of_what_is_sent():
    kv = contract.cache(contract.RAGGED)
    kv.groups[1].values[0, 0, 0, 4, 1] = float("nan")
    plan = Plan.everything(kv)
    plan.classes[:, :, 2] = 0
    plan.classes[1, 1, 4] = 4
    with pytest.raises(NotFinite, match="value at layer 1, head 0, token 4"):
        MIXED.encode(kv, plan)
    plan.classes[1, :, 4] = 0
    assert decode(MIXED.encode(kv, plan), kv.geometry).n_tokens == 6
