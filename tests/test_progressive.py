"""The codec in layers: nested cells, chunks in any number, every prefix, felt errors, caps to the byte."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from kvferry.codec import decode, roundtrip
from kvferry.codec.ecsq import Ecsq
from kvferry.codec.entropy.tables import TOTAL, tables
from kvferry.codec.progressive import Progressive, decode_prefix
from kvferry.codec.progressive.chunk import Place, read_place, read_symbols, write_symbols
from kvferry.codec.progressive.contexts import contexts, outward
from kvferry.codec.progressive.order import by_gain, places, refines
from kvferry.codec.progressive.stages import EXPONENTS, LEVELS, layer_of, n_stages, parent
from kvferry.errors import BadSpec, Malformed, Truncated
from kvferry.kv import KV, Plan
from kvferry.session.sender import Sender
from kvferry.wire import Frame, Segment, SegmentType, pack, unpack, unpack_prefix
from kvferry.wire.header import HEADER_BYTES
from paths import on_both
from profiles import held_profile

KV_CACHE = contract.cache(((2, 8, 8),) * 3, n_tokens=70, seed=2)
CODEC = Progressive(-96)
recipes = contract.recipes().map(
    lambda recipe: replace(recipe, space="content", scale=min(recipe.scale, 1.0))
)
seeds = st.integers(0, 1 << 30)


def chunks(frame: Frame) -> list[bytes]:
    return frame.bodies(SegmentType.PAYLOAD)


def with_chunks(frame: Frame, bodies: list[bytes]) -> Frame:
    before = tuple(s for s in frame.segments if s.type != SegmentType.PAYLOAD)
    return replace(frame, segments=(*before, *(Segment(SegmentType.PAYLOAD, body) for body in bodies)))


def place_of(body: bytes) -> Place:
    return read_place(body, 5, 1 << 20)[0]


def error(kv: KV, came: KV) -> float:
    """Squared, of all numbers."""
    pairs = zip(kv.groups, came.groups, strict=True)
    return sum(
        float((a.keys - b.keys).square().sum() + (a.values - b.values).square().sum()) for a, b in pairs
    )


# Cells


@given(st.integers(-(1 << 40), 1 << 40))
def test_a_cell_has_three_children(number):
    children = np.array([3 * number - 1, 3 * number, 3 * number + 1])
    assert (parent(children) == number).all()
    assert parent(np.array([3 * number + 2, 3 * number - 2])).tolist() == [number + 1, number - 1]


def test_what_a_factor_of_three_is_in_levels_and_exponents():
    octaves = np.log2(3) * np.arange(len(LEVELS))
    assert tuple(np.rint(4 * octaves)) == LEVELS
    assert tuple(np.rint(64 * octaves)) == EXPONENTS


def test_a_number_in_the_middle_of_a_coarse_cell_stays_in_the_middle():
    numbers = np.arange(-200, 201)
    coarse = parent(parent(numbers))
    assert (np.abs(numbers - 9 * coarse) <= 4).all()
    assert (coarse == -parent(parent(-numbers))).all()


# Contexts


def test_the_tables_of_all_contexts_are_whole_and_follow_the_frozen_ones():
    found, frozen = contexts(), tables()
    rows = found.book.frequency
    assert (rows > 0).all() and (rows.sum(1) == TOTAL).all() and len(rows) == 2 * (found.alike + 1) <= 256
    for table, reach in enumerate(frozen.reach):
        for size in range(found.count[table]):
            inner, middle, outer = frozen.frequency[table, reach + 3 * size - 1 : reach + 3 * size + 2] / 1.0
            context = found.first[table] + size
            first, second = rows[2 * context] / TOTAL, rows[2 * context + 1] / TOTAL
            assert first[1] == pytest.approx(outer / (inner + middle + outer), abs=1.1 / TOTAL)
            assert second[1] == pytest.approx(inner / (inner + middle), abs=1.1 / TOTAL)
    assert rows[-2:].tolist() == [[TOTAL - 5461, 5461], [TOTAL // 2, TOTAL // 2]]


@given(st.integers(-20, 108), st.integers(-(1 << 30), 1 << 30))
def test_what_is_open_is_decoded_to_within_the_inner_and_the_middle_third(level, cell):
    # Frozen centroids lie nearer to zero than the middles of thirds: 1.76 for the third at 2, at low levels.
    level = max(level, -12)
    (centre,) = contexts().open_centre(np.array([level]), np.array([cell])).tolist()
    direction = int(outward(np.array([cell]))[0])
    away, least = direction * centre, 3 * abs(cell) - (1.5 if cell else 1)
    assert least - 1e-6 * abs(cell) <= away <= 3 * abs(cell) + 1e-6 * abs(cell)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 205), st.integers(0, 1))))
def test_symbols_come_back_whatever_their_tables(both):
    rows = np.array(both, np.uint8).reshape(-1, 2)
    tables_of, symbols = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])
    body = write_symbols(tables_of, symbols)
    assert (read_symbols(memoryview(body), tables_of) == symbols).all()
    for damaged in (body[:-1], body + b"\0\0", b"\x09" + body[1:], b""):
        with pytest.raises(Malformed):
            read_symbols(memoryview(damaged), tables_of)


# Whole messages


@settings(max_examples=25)
@given(recipes, st.sampled_from([-200, -96, 40]), st.integers(1, 5), st.booleans(), st.booleans(), seeds)
def test_both_paths_agree_and_a_message_is_its_roundtrip(recipe, step, n_layers, profiled, classes, seed):
    kv = recipe.build()
    profile = held_profile(kv.geometry).name if profiled else "none"
    codec, plan = Progressive(step, profile=profile, n_layers=n_layers), None
    if classes:
        plan = Plan.everything(kv)
        generator = torch.Generator().manual_seed(seed)
        plan.classes.copy_(torch.randint(1, 6, plan.classes.shape, generator=generator))

    def coded() -> list[bytes]:
        data = pack(codec.encode(kv, plan))
        came = decode(unpack(data), kv.geometry)
        numbers = [tensor.numpy().tobytes() for g in came.groups for tensor in (g.keys, g.values)]
        if plan is None:
            (through,) = roundtrip(codec, kv).sequences()
            contract.same(replace(came, spans=through.spans), through)
        return [data, *numbers]

    plain, fast = on_both(coded)
    assert plain == fast


@settings(max_examples=25)
@given(recipes, st.sampled_from([-200, -96, 40]))
def test_one_layer_is_what_ecsq_decodes_to(recipe, step):
    kv = recipe.build()
    contract.same(roundtrip(Progressive(step, n_layers=1), kv), roundtrip(Ecsq(step), kv))


def test_all_layers_are_as_good_as_ecsq_and_little_longer():
    plain, layered = Ecsq(-96).encode(KV_CACHE), CODEC.encode(KV_CACHE)
    came = [error(KV_CACHE, decode(frame, KV_CACHE.geometry)) for frame in (plain, layered)]
    assert came[1] == pytest.approx(came[0], rel=0.02)
    assert len(pack(layered)) < 1.06 * len(pack(plain))


def felt_profile(with_shaping: bool) -> str:
    """Deviations of 1, equal steps, and errors of neighbours that are felt together."""
    from kvferry.codec.profiles import hold

    plain = held_profile(KV_CACHE.geometry)
    shaping = np.full(len(plain.shaping), 0.5 * with_shaping, np.float16)
    zeros = np.zeros(len(plain.weight), np.int16)
    return hold(
        replace(plain, shaping=shaping, weight=zeros, deviation=zeros, mean=zeros.astype(np.float32))
    ).name


def felt(kv: KV, came: KV) -> float:
    matrix = torch.tril(torch.full((8, 8), 0.5), -1) + torch.eye(8)
    pairs = zip(kv.groups, came.groups, strict=True)
    errors = [x - y for a, b in pairs for x, y in ((a.keys, b.keys), (a.values, b.values))]
    return sum(float((one @ matrix.T).square().sum()) for one in errors)


def test_noise_is_shaped_in_every_layer():
    """Each whole layer is felt as little as a message of `ecsq` of its step."""
    name = felt_profile(True)
    frame = Progressive(-128, profile=name).encode(KV_CACHE)
    for stage, step in ((0, -128 + EXPONENTS[2]), (2, -128 + EXPONENTS[1]), (4, -128)):
        some = with_chunks(frame, [body for body in chunks(frame) if place_of(body).stage <= stage])
        own = felt(KV_CACHE, decode(some, KV_CACHE.geometry))
        theirs = felt(KV_CACHE, roundtrip(Ecsq(step, profile=name), KV_CACHE))
        unshaped = felt(KV_CACHE, roundtrip(Ecsq(step, profile=felt_profile(False)), KV_CACHE))
        assert own == pytest.approx(theirs, rel=0.04)
        assert own < 0.9 * unshaped


def test_numbers_that_escape_their_tables():
    kv = contract.cache(((2, 8, 8),), n_tokens=40)
    kv.groups[0].keys[0, 0, 0, 3, 2], kv.groups[0].values[0, 0, 1, 5, 1] = 3e4, -77.0
    came = roundtrip(CODEC, kv)
    contract.same(came, decode(unpack(pack(CODEC.encode(kv))), kv.geometry))
    assert float(came.groups[0].keys[0, 0, 0, 3, 2]) == pytest.approx(3e4, rel=0.01)


# Parts of messages


def test_every_prefix_decodes_and_gets_better_with_each_chunk():
    data = pack(CODEC.encode(KV_CACHE))
    bodies = chunks(unpack(data))
    errors, so_far = [], -1
    for n_bytes in [*range(HEADER_BYTES, len(data), 13), len(data)]:
        came = len(chunks(unpack_prefix(data[:n_bytes]).frame))
        if came == so_far:
            continue
        so_far = came
        if came == 0:
            with pytest.raises(Truncated):
                decode_prefix(data[:n_bytes], KV_CACHE.geometry)
            continue
        kv = decode_prefix(data[:n_bytes], KV_CACHE.geometry)
        assert bool(kv.present.all())
        errors.append(error(KV_CACHE, kv))
    assert so_far == len(bodies) == len(errors) > 5
    assert all(after < before for before, after in pairwise(errors))
    contract.same(decode_prefix(data, KV_CACHE.geometry), decode(unpack(data), KV_CACHE.geometry))


def test_chunks_do_without_any_that_they_do_not_refine():
    frame = CODEC.encode(KV_CACHE)
    bodies = chunks(frame)
    generator = np.random.default_rng(0)
    for _ in range(20):
        some: list[bytes] = []
        for body in bodies:
            fits = refines(place_of(body), [place_of(one) for one in some])
            if fits and (place_of(body).stage == 0 or generator.random() < 0.6):
                some.append(body)
        assert bool(decode(with_chunks(frame, some), KV_CACHE.geometry).present.all())


def test_a_chunk_that_refines_what_did_not_come_is_refused():
    frame = CODEC.encode(KV_CACHE)
    bodies = chunks(frame)
    later = next(body for body in bodies if place_of(body).stage == 2)
    bad = [[], bodies[1:], [bodies[0], later], [bodies[0], bodies[0]], [*bodies, bodies[-1]], bodies[::-1]]
    for some in [*bad, [b""], [*bodies, b""], [b"\x05" + bodies[0][1:]], [b"\x00\x00\x07" + bodies[0][3:]]]:
        with pytest.raises(Malformed):
            decode(with_chunks(frame, some), KV_CACHE.geometry)


def test_a_layer_whose_coarsest_chunk_did_not_come_is_absent(monkeypatch):
    from kvferry.codec.progressive import order

    monkeypatch.setattr(order, "_BASE_BYTES", 1)
    whole = CODEC.encode(KV_CACHE)
    first = [body for body in chunks(whole) if place_of(body).stage == 0]
    assert [place_of(body) for body in first] == [Place(0, block, 1) for block in range(6)]
    came = decode(with_chunks(whole, [first[0], first[1], first[3]]), KV_CACHE.geometry)
    assert came.present[:, 0, 0].tolist() == [True, False, False]
    assert bool(came.layer(1)[0].eq(0).all())
    one = decode(with_chunks(whole, first), KV_CACHE.geometry)
    assert torch.equal(one.layer(0)[0], came.layer(0)[0])
    contract.same(decode(whole, KV_CACHE.geometry), roundtrip(CODEC, KV_CACHE))


def test_caps_are_kept_and_used():
    whole = CODEC.encode(KV_CACHE)
    least, most = CODEC.smallest(KV_CACHE), len(pack(whole))
    errors = []
    for cap in range(least, most + 200, (most - least) // 20):
        frame = CODEC.encode(KV_CACHE, max_bytes=cap)
        assert len(pack(frame)) <= cap
        assert len(pack(frame)) > min(cap, most) - 400
        first = next(i for i, body in enumerate([*chunks(whole), b""]) if body not in chunks(frame))
        assert chunks(frame)[:first] == chunks(whole)[:first]
        errors.append(error(KV_CACHE, decode(unpack(pack(frame)), KV_CACHE.geometry)))
    assert errors[-1] == min(errors) < 0.05 * errors[0]
    assert sum(after <= before for before, after in pairwise(errors)) >= len(errors) - 2


def test_what_still_fits_is_taken():
    """Where the next chunk does not fit as a whole, the blocks that do."""
    whole = CODEC.encode(KV_CACHE)
    for cap in range(CODEC.smallest(KV_CACHE), len(pack(whole)), 400):
        *_, last = chunks(CODEC.encode(KV_CACHE, max_bytes=cap))
        if last not in chunks(whole):
            assert place_of(last).count < 6
            return
    raise AssertionError("every cap took whole chunks alone")


def test_a_message_without_tokens():
    empty = contract.cache(n_tokens=0)
    frame = CODEC.encode(empty)
    assert chunks(frame) == [b""]
    assert decode_prefix(pack(frame), empty.geometry).n_tokens == 0
    assert len(pack(frame)) == CODEC.smallest(empty)


def test_options():
    for wrong in ({"n_layers": 0}, {"n_layers": 6}, {"step": 1025}):
        with pytest.raises(BadSpec, match="progressive"):
            Progressive(**wrong)
    with pytest.raises(Malformed, match="exponent"):
        decode(_too_coarse(), KV_CACHE.geometry)


def _too_coarse() -> Frame:
    frame = Progressive(weighting="part").encode(KV_CACHE)
    weights = Segment(SegmentType.WEIGHTS, b"\xf0\x0a\xf0\x0a")
    others = tuple(s for s in frame.segments if s.type != SegmentType.WEIGHTS)
    return replace(frame, segments=(*others, weights))


# Order


@given(st.lists(st.lists(st.floats(0, 5000), min_size=5, max_size=5), min_size=1, max_size=12))
def test_chunks_hold_every_stage_of_every_block_once(n_bytes):
    found = places(n_bytes)
    held = sorted((place.stage, block) for place in found for block in place.blocks)
    assert held == [(stage, block) for stage in range(5) for block in range(len(n_bytes))]
    written = by_gain(found, lambda place: hash(place) % 7)
    assert sorted(written) == sorted(found)
    assert all(refines(place, written[:index]) for index, place in enumerate(written))


def test_what_is_worth_most_comes_first():
    chunk = [Place(stage, block, 1) for stage in range(2) for block in range(3)]
    written = by_gain(chunk, lambda place: place.first)
    assert written == [*chunk[:3], *chunk[:2:-1]]


def test_stages():
    assert [n_stages(n) for n in range(1, 6)] == [1, 3, 5, 7, 9]
    assert [layer_of(stage, 2) for stage in range(3)] == [1, 0, 0]


def test_a_model_of_the_zoo():
    """Prefixes of a long message are as good as messages of `ecsq` that take a ninth less, on average."""
    kv = next(Sender("llama").capture([" ".join(20 * ["Ann has tea in Oslo."])]).sequences())
    data, shares = pack(CODEC.encode(kv)), []
    for n_bytes in range(CODEC.smallest(kv), len(data), 1500):
        prefix = unpack_prefix(data[:n_bytes])
        own = error(kv, decode(prefix.frame, kv.geometry))
        shares.append(
            own / error(kv, decode(Ecsq().encode(kv, max_bytes=int(0.9 * prefix.n_bytes_used)), kv.geometry))
        )
    assert len(shares) > 5
    assert sum(shares) / len(shares) < 1
