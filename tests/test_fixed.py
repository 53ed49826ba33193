"""Fixed-rate codecs: every option keeps the contract, fast is as slow in every bit, levels are where they should be."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from kvferry.codec import CODECS, decode, fast, integer_fast, roundtrip
from kvferry.codec.bits import pack_codes, packed_length, unpack_codes
from kvferry.codec.groups import SCALE_DTYPES, highest_scale
from kvferry.codec.nf4 import LEVELS
from kvferry.errors import BadSpec, BudgetTooSmall, Malformed, NotFinite
from kvferry.kv import Group
from kvferry.wire import Limits, Segment, SegmentType, pack, unpack

SPECS = [
    "int(6, group=3)",
    "int(3)",
    "int(2, group=5)",
    "int(2, group=0, axis=head, scale=bfloat16)",
    "int(4, group=7, axis=block, centred=True)",
    "int(3, group=3, axis=channel, centred=True, zstd=1)",
    "int(8, group=0, axis=block)",
    "int(8, group=0, axis=token, zstd=19)",
    "int(8, group=0, axis=channel)",
    "nf4(block=5)",
    "nf4(scale=bfloat16, zstd=1)",
    "fp8(e5m2)",
    "fp8(group=3, axis=token, scale=float16)",
    "raw(float16, zstd=3)",
]
MEMBERS = {spec: CODECS.parse(spec) for spec in SPECS}
quick = settings(max_examples=8, deadline=None)
every_codec = pytest.mark.parametrize("codec", MEMBERS.values(), ids=SPECS)
needs_numba = pytest.mark.skipif(not fast.available(), reason="numba is not installed")


@every_codec
def test_spec(codec):
    contract.check_spec(CODECS, codec)
    assert len(repr(codec)) <= 256


@every_codec
def test_errors(codec):
    contract.check_errors(codec)


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


@every_codec
@pytest.mark.parametrize("n_tokens", [0, 1, 9])
def test_a_cap_is_exact(codec, n_tokens):
    kv = contract.cache(contract.RAGGED, n_tokens=n_tokens)
    contract.check_cap(codec, kv)
    size = len(pack(codec.encode(kv)))
    with pytest.raises(BudgetTooSmall) as caught:
        codec.encode(kv, max_bytes=size - 1)
    assert caught.value.smallest_bytes == size


@every_codec
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e3, 1e30, 1e37])
def test_numbers_stay_finite_and_near(codec, scale):
    """Constant, subnormal and huge caches."""
    kv = contract.cache(contract.RAGGED, scale=scale)
    if codec.name == "raw" and scale > 1e3:
        with pytest.raises(NotFinite, match="infinite in float16"):
            codec.encode(kv)
        return
    came = contract.over_the_wire(codec, kv)
    for one, other in zip(kv.groups, came.groups, strict=True):
        assert other.keys.isfinite().all()
        assert ((other.keys - one.keys).abs() <= 1.5 * one.keys.abs().max() + 1e-3).all()


@needs_numba
@pytest.mark.parametrize("axis", ["token", "channel", "head", "block"])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_the_fast_path_gives_the_same_bytes_and_numbers(axis, bits, monkeypatch):
    for group, scale, centred, dtype in itertools.product(
        (0, 5, 32), ("float16", "bfloat16"), (False, True), (torch.float32, torch.bfloat16, torch.float16)
    ):
        codec = CODECS.get("int")(bits, group, axis, centred, scale)
        kv = _as(contract.cache(((3, 17, 7),) * 3, n_tokens=13), dtype)
        slow = pack(codec.encode(kv))
        decoded = decode(unpack(slow), kv.geometry)
        with monkeypatch.context() as patch:
            patch.setattr(integer_fast, "SMALLEST", 1)
            assert pack(codec.encode(kv)) == slow
            contract.same(decode(unpack(slow), kv.geometry), decoded)
        contract.same(roundtrip(codec, kv), decoded)


def _as(kv, dtype):
    """Small values, whose float16 scales are subnormal, in another type."""
    return kv.with_groups(
        tuple(Group(g.layers, g.keys.to(dtype), (g.values * 1e-5).to(dtype)) for g in kv.groups)
    )


@needs_numba
def test_the_fast_path_is_taken_and_names_what_is_not_finite():
    kv = contract.cache(((2, 64, 64),) * 2, n_tokens=256)
    assert integer_fast.takes(kv.groups[0].keys)
    codec = CODECS.parse("int(4)")
    contract.same(contract.over_the_wire(codec, kv), roundtrip(codec, kv))
    for bad in (float("nan"), float("inf"), -float("inf")):
        kv.groups[0].values[1, 0, 1, 200, 3] = bad
        with pytest.raises(NotFinite, match="value at layer 1, head 1, token 200"):
            codec.encode(kv)


@needs_numba
@pytest.mark.parametrize("spec", ["int(8)", "int(6)", "int(4)"])
def test_the_fast_path_refuses_codes_that_are_never_written(spec, monkeypatch):
    monkeypatch.setattr(integer_fast, "SMALLEST", 1)
    _refuses_the_lowest_code(spec)


@pytest.mark.parametrize("spec", ["int(8)", "int(6)", "int(4)"])
def test_codes_that_are_never_written_are_refused(spec):
    _refuses_the_lowest_code(spec)


def _refuses_the_lowest_code(spec):
    kv = contract.cache(((1, 4, 4),), n_tokens=2)
    codec = CODECS.parse(spec)
    lowest = bytes([1 << codec.bits - 1])
    with pytest.raises(Malformed):
        decode(_with_body(codec.encode(kv), 4, lowest), kv.geometry)


def _with_body(frame, at, new):
    """The frame with the bytes at `at` of its first payload replaced."""
    segments = list(frame.segments)
    first = next(i for i, segment in enumerate(segments) if segment.type == SegmentType.PAYLOAD)
    body = segments[first].body
    segments[first] = Segment(SegmentType.PAYLOAD, body[:at] + new + body[at + len(new) :])
    return type(frame)(**{**frame.__dict__, "segments": tuple(segments)})


@pytest.mark.parametrize("fast_too", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize(("bits", "used"), [(6, 2), (4, 4), (3, 1), (2, 6)])
def test_unused_bits_are_refused(bits, used, fast_too, monkeypatch):
    monkeypatch.setattr(integer_fast, "SMALLEST", 1 if fast_too else 1 << 40)
    codec = CODECS.parse(f"int({bits})")
    kv = contract.cache(((1, 3, 3),), n_tokens=1)
    frame = codec.encode(kv)
    keys_end = codec.block_bytes(1, 1, 3)
    last = frame.body(SegmentType.PAYLOAD)[keys_end - 1]
    for bit in range(8):
        bad = _with_body(frame, keys_end - 1, bytes([last | 1 << bit]))
        if bit >= used:
            with pytest.raises(Malformed):
                decode(bad, kv.geometry)


@pytest.mark.parametrize("spec", ["int(4)", "nf4", "fp8", "int(2, scale=bfloat16)"])
@pytest.mark.parametrize("fast_too", [False, pytest.param(True, marks=needs_numba)])
def test_scales_are_positive_and_finite(spec, fast_too, monkeypatch):
    monkeypatch.setattr(integer_fast, "SMALLEST", 1 if fast_too else 1 << 40)
    codec, kv = CODECS.parse(spec), contract.cache(((1, 4, 4),), n_tokens=1)
    frame = codec.encode(kv)
    dtype = SCALE_DTYPES[codec.scale]
    for wrong in (0.0, -0.0, -1.0, float("inf"), float("nan")):
        sent = torch.tensor([wrong], dtype=dtype).view(torch.uint8).numpy().tobytes()
        with pytest.raises(Malformed, match="scale"):
            decode(_with_body(frame, 0, sent), kv.geometry)


def test_no_scale_makes_a_number_infinite():
    for top, scale in itertools.product((1.0, 2.0, 4.0, 7.0, 31.0, 127.0, 448.0, 57344.0), SCALE_DTYPES):
        highest = highest_scale(top, scale)
        assert torch.tensor(top) * torch.tensor(highest) < float("inf")
        assert float(torch.tensor(highest).to(SCALE_DTYPES[scale])) == highest


@quick
@given(st.lists(st.integers(0, 255), max_size=40), st.sampled_from([2, 3, 4, 6, 8]))
def test_packing_is_a_string_of_bits(numbers, bits):
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    string = sum(code << bits * i for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == string.to_bytes(packed_length(len(codes), bits), "little")
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes.tolist()


@pytest.mark.parametrize(("bits", "bound"), [(8, 4e-5), (6, 5e-4), (4, 0.011), (3, 0.036), (2, 0.15)])
def test_error_on_normal_numbers(bits, bound):
    """Squared error in groups of 32, as the docstring of `Int` says."""
    kv = contract.cache(((4, 64, 64),), n_tokens=64)
    came = roundtrip(CODECS.parse(f"int({bits})"), kv).groups[0].keys
    assert (came - kv.groups[0].keys).square().mean() < bound


@pytest.mark.parametrize("bits", [3, 2])
def test_few_bits_are_equal_cells(bits):
    kv = contract.cache(((1, 32, 32),), n_tokens=4)
    peak = kv.groups[0].keys.abs().amax(-1, keepdim=True)
    came = roundtrip(CODECS.parse(f"int({bits})"), kv).groups[0].keys
    assert ((came - kv.groups[0].keys).abs() <= peak / 2**bits * 1.01).all()
    assert len((came / peak).mul(2**bits).round().unique()) == 2**bits


def test_constant_keys_cost_nothing_when_centred():
    kv = contract.cache(((2, 8, 8),), n_tokens=5)
    kv.groups[0].keys[:] = torch.arange(8.0) * 64 - 200
    assert torch.equal(roundtrip(CODECS.parse("int(4, centred=True)"), kv).groups[0].keys, kv.groups[0].keys)
    assert not torch.equal(roundtrip(CODECS.parse("int(4)"), kv).groups[0].keys, kv.groups[0].keys)


def test_centring_counts_its_bytes_and_helps_keys_far_from_zero():
    kv = contract.cache(((2, 64, 64),), n_tokens=40)
    kv.groups[0].keys.add_(torch.linspace(-9, 9, 64))
    plain, centred = (CODECS.parse(f"int(4, centred={on})") for on in (False, True))
    sizes = [len(codec.encode(kv).body(SegmentType.PAYLOAD)) for codec in (plain, centred)]
    assert sizes[1] - sizes[0] == 2 * 2 * 64
    errors = [(roundtrip(c, kv).groups[0].keys - kv.groups[0].keys).square().mean() for c in (plain, centred)]
    assert errors[1] < errors[0] / 4


def test_a_mean_that_is_not_finite_is_refused():
    kv = contract.cache(((1, 4, 4),), n_tokens=2)
    frame = CODECS.parse("int(4, centred=True)").encode(kv)
    with pytest.raises(Malformed, match="mean"):
        decode(_with_body(frame, 0, b"\x00\x7c"), kv.geometry)


@pytest.mark.parametrize(
    ("axis", "group", "n_scales"),
    [
        ("token", 0, 15), ("token", 3, 30), ("channel", 0, 12), ("head", 0, 3), ("block", 0, 1), ("block", 7, 9),
    ],
)  # fmt: skip
def test_granularities(axis, group, n_scales):
    codec = CODECS.get("int")(8, group, axis)
    assert codec.block_bytes(heads=3, tokens=5, dim=4) == 2 * n_scales + 60
    assert codec.block_bytes(heads=3, tokens=0, dim=4) == 0


def test_int4_in_groups_of_64_contiguous_numbers_is_what_the_field_does():
    kv = contract.cache(((2, 24, 24),), n_tokens=16)
    came = contract.over_the_wire(CODECS.parse("int(4, group=64, axis=block)"), kv).groups[0].keys
    groups = kv.groups[0].keys.reshape(-1, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / torch.tensor(7.0)).half().float()
    assert torch.equal(came.reshape(-1, 64), (groups / scale).round().clamp(-7, 7) * scale)


def test_nf4_levels_are_the_quantiles_of_a_normal_distribution():
    quantile, outermost = NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    expected = np.sort([*above, 0.0, *below]) / quantile(outermost)
    assert np.array_equal(np.float32(LEVELS), np.float32(expected))


def test_nf4_takes_the_nearest_level():
    kv = contract.cache(((1, 64, 64),), n_tokens=32)
    came = contract.over_the_wire(CODECS.parse("nf4"), kv).groups[0].keys.reshape(-1, 64)
    values = kv.groups[0].keys.reshape(-1, 64)
    scale = values.abs().amax(-1, keepdim=True).half().float()
    nearest = (values.unsqueeze(-1) - scale.unsqueeze(-1) * torch.tensor(LEVELS)).abs().amin(-1)
    assert torch.allclose((came - values).abs(), nearest, atol=1e-6)
    assert (came - values).square().mean() < 0.01


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_that_of_torch(name, dtype):
    codec = CODECS.get("fp8")(name)
    codes = torch.arange(256).to(torch.uint8)
    units = codes.view(dtype).float()
    assert torch.equal(codec.forbidden(codes), ~units.isfinite())
    finite = units[units.isfinite()]
    assert torch.equal(codec.units(codec.codes(finite)), finite)
    assert torch.equal(
        codec.units(codec.codes(torch.tensor([1e9, -1e9]))), torch.tensor([1.0, -1.0]) * codec.top
    )
    numbers = torch.randn(4096) * 20
    assert torch.equal(codec.units(codec.codes(numbers)), numbers.to(dtype).float())


def test_fp8_uses_its_range_and_refuses_nan():
    kv = contract.cache(((2, 4, 4),), n_tokens=6, scale=1e-6)
    codec = CODECS.parse("fp8")
    frame = codec.encode(kv)
    came = decode(frame, kv.geometry).groups[0].keys
    assert ((came - kv.groups[0].keys).abs() <= kv.groups[0].keys.abs() / 16 + 1e-9).all()
    with pytest.raises(Malformed, match="0x7f"):
        decode(_with_body(frame, 4, b"\x7f"), kv.geometry)


def test_the_second_stage_is_exact_and_shortens():
    kv = contract.cache(((2, 64, 64),), n_tokens=64)
    kv.groups[0].keys[..., :32] = 0
    plain, squeezed = CODECS.parse("int(8)"), CODECS.parse("int(8, zstd=3)")
    contract.same(contract.over_the_wire(plain, kv), contract.over_the_wire(squeezed, kv))
    assert len(pack(squeezed.encode(kv))) < len(pack(plain.encode(kv)))


@pytest.mark.parametrize(
    "body",
    [
        zstandard.compress(bytes(1 << 20)),
        zstandard.compress(bytes(127)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(128)),
        zstandard.compress(bytes(128)) + b"\0",
        zstandard.compress(bytes(128)) + zstandard.compress(bytes(128)),
        zstandard.compress(bytes(128))[:-1],
        zstandard.compress(np.random.default_rng(0).bytes(128)),
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=27)
        ).compressobj(size=128).flush(),
        b"",
        bytes(127),
        bytes(129),
    ],
    ids=["bomb", "short", "silent", "tail", "two", "cut", "longer", "empty frame", "nothing", "less", "more"],
)  # fmt: skip
def test_what_is_no_squeezed_body_is_refused(body):
    kv = contract.cache(((1, 4, 4),), n_tokens=4)
    frame = CODECS.parse("raw(zstd=1)").encode(kv)
    segments = [s if s.type != SegmentType.PAYLOAD else Segment(s.type, body) for s in frame.segments]
    with pytest.raises(Malformed):
        decode(type(frame)(**{**frame.__dict__, "segments": tuple(segments)}), kv.geometry, Limits())


@pytest.mark.parametrize(
    "spec", ["int(zstd=23)", "raw(zstd=-1)", "nf4(block=0)", "fp8(e3m4)", "int(scale=float32)"]
)
def test_bad_options(spec):
    with pytest.raises(BadSpec):
        CODECS.parse(spec)
