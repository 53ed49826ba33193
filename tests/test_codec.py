"""Codecs: every member keeps the contract; each keeps its own promise about numbers and bytes."""

import importlib
import inspect
import pkgutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
import kvferry.codec
from kvferry.codec import CODECS, Codec, decode, roundtrip
from kvferry.codec.manifest import spans_segment, wire_hash
from kvferry.codec.varints import read_varints, unzigzag, write_varints, zigzag
from kvferry.errors import (
    BadSpec,
    LimitExceeded,
    Malformed,
    NotFinite,
    ShapeMismatch,
    UnknownName,
    UsageError,
)
from kvferry.kv import Group, Plan, Role, Spans
from kvferry.wire import Limits, SegmentType, pack, packed_bytes, unpack, unpack_prefix

SPECS = [
    "raw",
    "raw(float16)",
    "raw(bfloat16)",
    "int",
    "int(8, group=3)",
    "int(4)",
    "int(4, group=1)",
    "int(4, group=3, axis=channel)",
    "int(8, group=1000000000000, axis=channel)",
    "nf4",
    "fp8",
    "mixed",
    "mixed(int8_int4_int2, group=3)",
    "ecsq",
    "ecsq(step=-300, weighting=part)",
    "ecsq(step=40, weighting=frame)",
    "progressive",
    "progressive(step=-300, weighting=part, n_layers=4)",
    "progressive(step=40, weighting=frame, n_layers=2)",
]
INTS = [spec for spec in SPECS if spec.startswith("int")]
MEMBERS = {spec: CODECS.parse(spec) for spec in SPECS}
quick = settings(max_examples=12, deadline=None)
every_codec = pytest.mark.parametrize("codec", MEMBERS.values(), ids=SPECS)


def test_every_codec_on_disk_is_in_the_table_and_tried_here():
    names = [info.name for info in pkgutil.iter_modules(kvferry.codec.__path__)]
    modules = [importlib.import_module(f"kvferry.codec.{name}") for name in names]
    found = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    on_disk = {cls for cls in found if issubclass(cls, Codec) and not inspect.isabstract(cls)}
    assert (
        on_disk
        == {CODECS.get(name) for name in CODECS.names()}
        == {type(codec) for codec in MEMBERS.values()}
    )


@every_codec
def test_spec(codec):
    contract.check_spec(CODECS, codec)


@every_codec
def test_errors(codec):
    contract.check_errors(codec)


@every_codec
def test_cap(codec):
    contract.check_cap(codec, contract.cache(contract.RAGGED))


@every_codec
@quick
@given(recipe=contract.recipes(max_batch=3))
def test_batched_roundtrip_equals_the_wire(codec, recipe):
    contract.check_batched_equals_single(codec, recipe.build())


@every_codec
@quick
@given(recipe=contract.recipes())
def test_canonical(codec, recipe):
    contract.check_canonical(codec, recipe.build())


@quick
@given(recipe=contract.recipes())
def test_raw_float32_is_exact(recipe):
    kv = recipe.build()
    (sequence,) = kv.sequences()
    contract.same(contract.over_the_wire(MEMBERS["raw"], kv), _zero_absent(sequence))


def _zero_absent(kv):
    groups = []
    for group in kv.groups:
        slots = kv.present[list(group.layers)][:, :, None, :, None]
        keys, values = (torch.where(slots, x, 0.0) for x in (group.keys, group.values))
        groups.append(Group(group.layers, keys, values))
    return kv.with_groups(tuple(groups))


@pytest.mark.parametrize("spec", ["raw(float16)", "raw(bfloat16)"])
def test_raw_rounds_to_its_dtype(spec):
    kv = contract.cache()
    came = contract.over_the_wire(MEMBERS[spec], kv).groups[0].keys
    dtype = getattr(torch, MEMBERS[spec].dtype)
    assert torch.equal(came, kv.groups[0].keys.to(dtype).float())


def test_raw_refuses_what_overflows_its_dtype():
    kv = contract.cache(scale=1e6)
    with pytest.raises(NotFinite, match="infinite in float16"):
        MEMBERS["raw(float16)"].encode(kv)
    contract.over_the_wire(MEMBERS["raw(bfloat16)"], kv)


@pytest.mark.parametrize("spec", INTS)
@quick
@given(recipe=contract.recipes())
def test_int_error_is_half_a_scale(spec, recipe):
    codec, kv = MEMBERS[spec], recipe.build()
    came = roundtrip(codec, kv)
    for group, coded in zip(kv.groups, came.groups, strict=True):
        slots = kv.present[list(group.layers)][:, :, None, :, None]
        for before, after in ((group.keys, coded.keys), (group.values, coded.values)):
            before = torch.where(slots, before, 0.0)
            # The largest of the layer, head and sequence bounds the largest of any group within it.
            scale = (
                before.abs().amax((-1, -2), keepdim=True) / (2 ** (codec.bits - 1) - 1)
                if before.numel()
                else 0.0
            )
            bound = scale / 2 + (scale * 2**-11 + 2**-25) * 2**codec.bits + 2**-25
            assert ((after - before).abs() <= bound).all()


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int_error_against_its_own_group(bits, axis):
    codec = CODECS.parse(f"int({bits}, group=4, axis={axis})")
    kv = contract.cache(((2, 8, 8),), n_tokens=8)
    before, after = kv.groups[0].keys, roundtrip(codec, kv).groups[0].keys
    if axis == "channel":
        before, after = before.transpose(-1, -2), after.transpose(-1, -2)
    groups = before.unflatten(-1, (2, 4))
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((after.unflatten(-1, (2, 4)) - groups).abs() <= scale * (0.5 + 2**-11 * 2**bits)).all()


@pytest.mark.parametrize("spec", INTS)
def test_int_survives_scales_beyond_float16(spec):
    kv = contract.cache(scale=1e30)
    came = contract.over_the_wire(MEMBERS[spec], kv)
    assert came.groups[0].keys.isfinite().all()
    assert contract.over_the_wire(MEMBERS[spec], contract.cache(scale=0.0)).groups[0].keys.eq(0).all()


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3])
def test_int4_is_two_codes_a_byte(n_tokens):
    kv = contract.cache(((1, 3, 5),), n_tokens=n_tokens)
    (body,) = CODECS.parse("int(4)").encode(kv).bodies(SegmentType.PAYLOAD)
    keys, values = -(-3 * n_tokens // 2), -(-5 * n_tokens // 2)
    assert len(body) == 2 * n_tokens + keys + 2 * n_tokens + values


def test_plan_drops_tokens_per_layer():
    kv = contract.cache(contract.RAGGED, n_tokens=6)
    plan = Plan.everything(kv)
    plan.classes[:, :, 0] = 0
    plan.classes[2, :, 3:] = 0
    plan.classes[1, :, 5] = 7  # any class above 0 is sent alike
    came = decode(unpack(pack(MEMBERS["raw"].encode(kv, plan))), kv.geometry)
    assert came.n_tokens == 5
    assert torch.equal(came.present[:, 0], plan.classes[:, 0, 1:] > 0)
    assert came.positions.tolist() == [[[1, 2, 3, 4, 5]]]
    assert torch.equal(came.layer(1)[0], kv.layer(1)[0][:, :, 1:])
    assert came.layer(2)[0][:, :, 2:].eq(0).all()


def test_tokens_dropped_by_the_plan_need_not_be_finite():
    kv = contract.cache()
    kv.groups[0].keys[:, :, :, 2] = float("nan")
    plan = Plan.everything(kv)
    plan.classes[:, :, 2] = 0
    assert decode(MEMBERS["raw"].encode(kv, plan), kv.geometry).n_tokens == 6


def test_roles_travel_and_spans_only_when_asked_for():
    roles = np.array([Role.SPECIAL, 0, 0, Role.TEMPLATE], np.uint8)
    kv = contract.cache(n_tokens=4, spans=(contract.spans(4, roles),))
    frame = MEMBERS["raw"].encode(kv)
    came = decode(frame, kv.geometry)
    assert came.spans[0].role.tolist() == [1, 0, 0, 2]
    assert came.spans[0].start.tolist() == came.spans[0].end.tolist() == [0] * 4
    part = np.array([0, 0, 1, 1], np.int32)
    sent = Spans(part, 5 * part + 3, 5 * part + 9, roles)
    frame = type(frame)(**{**frame.__dict__, "segments": (*frame.segments, spans_segment(sent))})
    read = decode(unpack(pack(frame)), kv.geometry).spans[0]
    assert [x.tolist() for x in (read.part, read.start, read.end)] == [
        x.tolist() for x in (sent.part, sent.start, sent.end)
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_size_is_known_before_coding(spec):
    frame = MEMBERS[spec].encode(contract.cache(contract.RAGGED, n_tokens=5))
    assert packed_bytes([len(segment.body) for segment in frame.segments]) == len(pack(frame))


def test_a_cut_message_keeps_whole_layers():
    frame = MEMBERS["int(4)"].encode(contract.cache())
    sizes = [len(pack(frame)) - cut for cut in (1, 60, 120)]
    layers = [len(unpack_prefix(pack(frame)[:size]).frame.bodies(SegmentType.PAYLOAD)) for size in sizes]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] == 3 > layers[2]


def test_roundtrip_carries_no_gradient_and_takes_any_dtype():
    kv = contract.cache(n_batch=2)
    half = kv.with_groups(
        tuple(Group(g.layers, g.keys.half().requires_grad_(), g.values.half()) for g in kv.groups)
    )
    came = roundtrip(MEMBERS["int(4)"], half).groups[0]
    assert came.keys.dtype == torch.float32
    assert not came.keys.requires_grad


def test_roundtrip_ignores_padding():
    kv = contract.cache(n_batch=2)
    present = kv.present.clone()
    present[:, 1, :3] = False
    clean = contract.cache(n_batch=2, present=present)
    dirty = contract.cache(n_batch=2, present=present)
    dirty.groups[0].keys[:, 1, :, :3] = float("nan")
    for codec in MEMBERS.values():
        contract.same(roundtrip(codec, clean), roundtrip(codec, dirty))


def test_roundtrip_is_fast():
    kv = contract.cache(((2, 24, 24),) * 3, n_tokens=256, n_batch=16)
    start = time.perf_counter()
    roundtrip(CODECS.parse("int(4, axis=channel)"), kv)
    assert time.perf_counter() - start < 2  # 1.2 M numbers; a loop over tokens takes far longer


def test_limits_bound_what_a_frame_unfolds_to():
    kv = contract.cache()
    frame = MEMBERS["int(4)"].encode(kv)
    with pytest.raises(LimitExceeded, match="336 numbers"):
        decode(frame, kv.geometry, Limits(max_elements=335))
    with pytest.raises(LimitExceeded, match="7 tokens"):
        decode(frame, kv.geometry, Limits(max_tokens=6))


@pytest.mark.parametrize("spec", ["int(bits=5)", "int(group=-1)", "int(axis=layer)", "raw(dtype=int8)"])
def test_bad_options(spec):
    with pytest.raises(BadSpec):
        CODECS.parse(spec)


def test_unknown_names():
    with pytest.raises(UnknownName, match="Did you mean 'int'"):
        CODECS.parse("itn(4)")
    with pytest.raises(UnknownName, match="Did you mean 'group'"):
        CODECS.parse("int(grp=4)")


def test_positions_and_fingerprints_have_bounds():
    kv = contract.cache(positions=torch.full((1, 1, 7), 1 << 40))
    with pytest.raises(ShapeMismatch, match="position"):
        MEMBERS["raw"].encode(kv)
    with pytest.raises(UsageError, match="fingerprint"):
        wire_hash("not hexadecimal")


@quick
@given(st.lists(st.integers(0, 2**35 - 1)))
def test_varints(values):
    array = np.array(values, np.int64)
    assert read_varints(write_varints(array)).tolist() == values
    assert unzigzag(zigzag(array - 1000)).tolist() == (array - 1000).tolist()


@pytest.mark.parametrize("body", [b"\x80", b"\x01\xff", b"\x80\x80\x80\x80\x80\x01"])
def test_varints_refuse_what_is_cut_or_long(body):
    with pytest.raises(Malformed):
        read_varints(body)


def test_an_option_that_stands_twice_is_refused():
    with pytest.raises(BadSpec, match="stands twice in the spec 'int"):
        CODECS.parse("int(bits=4, bits=8)")


def test_what_a_method_says_of_its_options_is_said_once():
    with pytest.raises(BadSpec, match=r"^codec nf4: nf4\(block=0\)\. block is at least 1") as caught:
        CODECS.parse("nf4(block=0)")
    assert caught.value.cure.startswith("block is at least 1")
