"""What every selector by score owes: how many, which, in whatever order the slots come, and typed refusals."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import contract
from kvferry.errors import BadSpec, EmptyContext, NotFinite, ShapeMismatch, UsageError
from kvferry.kv import KV, Evidence, Group, Plan, Role
from kvferry.select import SELECTORS
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Asked, Sight, alone
from selection_caps import check_range
from sights import (
    BY_ATTENTION,
    BY_CACHE,
    BY_CONTENT,
    BY_READOUT,
    OF_LAYERS,
    OF_TOKENS,
    drawn,
    mirrored,
    permuted,
    scaled,
    seen_by,
)
from tiny import random_rows

FLAT = ((1, 2, 2),)
"""One layer of one head, for caches that are written out."""


def selector(spec: str, **options: object) -> TokenSelector:
    return SELECTORS.from_json({**SELECTORS.parse(spec).to_json(), **options})


def written(keys: list[list[float]], values: list[list[float]]) -> KV:
    one, other = (torch.tensor(rows, dtype=torch.float32)[None, None, None] for rows in (keys, values))
    return contract.cache(FLAT, len(keys)).with_groups((Group((0,), one, other),))


def kept(plan: Plan, layer: int = 0) -> list[int]:
    return plan.classes[layer, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize("spec", OF_TOKENS)
@settings(max_examples=12)
@given(
    proportion=st.floats(0.01, 1.0),
    min_tokens=st.sampled_from([1, 2, 50]),
    n_slots=st.integers(1, 12),
    scope=st.sampled_from(["all_context", "prompt", "instruction_only"]),
    per_layer=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_share_of_the_scope_that_was_asked_for_is_kept(
    spec, proportion, min_tokens, n_slots, scope, per_layer, seed
):
    """Rounded up, the minimum at least, everything at most; the same slots and classes for keys and values."""
    roles = np.random.default_rng(seed).integers(0, 3, n_slots).astype(np.uint8)
    left_out = {"all_context": 0, "prompt": 1, "instruction_only": 2}[scope]
    inside = ~np.isin(roles, [Role.SPECIAL, Role.TEMPLATE][:left_out])
    options = {"proportion": proportion, "min_tokens": min_tokens, "scope": scope, "per_layer": per_layer}
    asked, sight = selector(spec, **options), drawn(n_slots, seed=seed, roles=roles)
    if not inside.any():
        with pytest.raises(EmptyContext):
            asked.plan(sight)
        return
    classes = asked.plan(sight).classes
    n_wanted = min(max(ceil(proportion * inside.sum() - 1e-9), min_tokens), inside.sum())
    assert classes.sum(-1).unique().tolist() == [n_wanted]
    assert not classes[..., ~inside].any()
    assert torch.equal(classes[:, 0], classes[:, 1])
    assert per_layer or classes.unique(dim=0).shape[0] == 1


@pytest.mark.parametrize(
    "spec", [*OF_TOKENS, "kvcomm(share=1.0)", "sensitive_layers(share=1.0)", "every_kth(k=1)"]
)
def test_everything_is_everything(spec):
    sight = drawn()
    assert torch.equal(SELECTORS.parse(spec).plan(sight).classes, Plan.everything(sight.kv).classes)


@pytest.mark.parametrize("spec", BY_CONTENT)
def test_scores_follow_the_slots_wherever_they_stand(spec):
    sight, order = drawn(), torch.tensor([3, 1, 8, 0, 2, 7, 5, 4, 6])
    want = SELECTORS.parse(spec).score(sight)[:, order]
    torch.testing.assert_close(SELECTORS.parse(spec).score(permuted(sight, order)), want)


@pytest.mark.parametrize("spec", BY_CONTENT)
def test_longer_values_change_no_choice(spec):
    sight = drawn()
    one, other = (SELECTORS.parse(spec).score(each) for each in (sight, scaled(sight, keys=1.0, values=8.0)))
    assert torch.equal(one.argsort(-1), other.argsort(-1))


@pytest.mark.parametrize("spec", [*BY_CACHE, *BY_READOUT])
def test_longer_keys_change_no_choice_of_the_cache_alone(spec):
    sight = drawn()
    one, other = (SELECTORS.parse(spec).score(each) for each in (sight, scaled(sight, keys=8.0, values=1.0)))
    assert torch.equal(one.argsort(-1), other.argsort(-1))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_batch_is_scored_as_its_sequences_alone(name):
    """Padding is no evidence."""
    rows = random_rows(3, 17)
    rows = [rows[0], rows[1][:11], rows[2][:6]]
    asked = random_rows(3, 3)
    specs = [*BY_CACHE, *BY_ATTENTION, "delta", "proj_vnorm"]
    for row, (sight, question) in enumerate(zip(seen_by(name, rows, asked), asked, strict=True)):
        [single] = seen_by(name, [rows[row]], [question])
        for spec in specs:
            one, other = (SELECTORS.parse(spec).score(each) for each in (sight, single))
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("spec", [*BY_CONTENT, *OF_LAYERS[1:], "adaptive(inner=vnorm)"])
def test_numbers_that_are_none_are_refused(spec):
    """Whatever a selector looks at, it looks at NaN."""
    with pytest.raises(NotFinite):
        SELECTORS.parse(spec).plan(_broken(drawn()))


def _broken(sight: Sight) -> Sight:
    nan, asked = float("nan"), sight.require_asked()
    bad = scaled(sight, keys=nan, values=nan)
    evidence = Evidence(
        queries_content=tuple(nan * one for one in sight.evidence.queries_content),
        attention_mass=tuple(nan * one for one in sight.evidence.attention_mass),
    )
    return replace(
        bad, evidence=evidence, asked=Asked(tuple(nan * one for one in asked.queries), asked.positions)
    )


@pytest.mark.parametrize("spec", [*BY_ATTENTION, *BY_READOUT, *OF_LAYERS[1:]])
def test_what_is_not_there_is_named(spec):
    with pytest.raises(UsageError, match=r"attention_mass|queries_content|question|aligner"):
        SELECTORS.parse(spec).plan(alone(contract.cache(n_tokens=5)))


@pytest.mark.parametrize("spec", ["tova", "question", "expected_attention"])
def test_a_model_whose_scale_is_not_known_is_refused(spec):
    with pytest.raises(UsageError, match="scales its attention"):
        SELECTORS.parse(spec).plan(replace(drawn(), scores=()))


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv(window=0)",
        "snapkv(pool=4)",
        "question(pool=2)",
        "expected_attention(n_future=0)",
        "kvcomm(share=0.0)",
        "kvcomm(alpha=1.5)",
        "kvcomm(sigma=0.0)",
        "sensitive_layers(window=0)",
        "every_kth(k=0)",
    ],
)
def test_an_impossible_option_is_refused(spec):
    with pytest.raises(BadSpec):
        SELECTORS.parse(spec)


def test_places():
    sight = alone(contract.cache(n_tokens=8))
    chosen = {name: kept(selector(name, proportion=0.5).plan(sight)) for name in ("front", "middle")}
    assert chosen == {"front": [0, 1, 2, 3], "middle": [2, 3, 4, 5]}
    assert kept(SELECTORS.parse("sinks_recent(proportion=0.5, sinks=1)").plan(sight)) == [0, 5, 6, 7]
    assert kept(SELECTORS.parse("sinks_recent(proportion=0.5)").plan(sight)) == [0, 1, 2, 3]


def test_lots_differ_by_seed_and_repeat():
    sight = alone(contract.cache(n_tokens=40))
    lots = [kept(SELECTORS.parse(f"random({seed}, proportion=0.5)").plan(sight)) for seed in (0, 0, 1)]
    assert lots[0] == lots[1] != lots[2]


def test_every_slot_is_drawn_equally_often():
    sight = alone(contract.cache(n_tokens=10))
    drawn_of = [kept(SELECTORS.parse(f"random({seed}, proportion=0.5)").plan(sight)) for seed in range(400)]
    counts = np.bincount([slot for lot in drawn_of for slot in lot], minlength=10)
    assert counts.sum() == 2000 and counts.min() > 150 and counts.max() < 250  # five deviations of 10


def test_norms_are_norms():
    kv = written(keys=[[3, 4], [0, 1], [0, 2]], values=[[1, 0], [6, 8], [0, 2]])
    assert SELECTORS.parse("knorm").score(alone(kv)).tolist() == [[-5, -1, -2]]
    assert SELECTORS.parse("knorm(keep=high)").score(alone(kv)).tolist() == [[5, 1, 2]]
    assert SELECTORS.parse("vnorm").score(alone(kv)).tolist() == [[1, 10, 2]]


def test_the_key_that_points_away_is_kept():
    kv = written(keys=[[1, 0], [9, 0], [0, 0.1], [2, 0]], values=[[0, 0]] * 4)
    centre = torch.tensor([3.0, 1.0]) / 10**0.5
    want = [-centre[0], -centre[0], -centre[1], -centre[0]]
    assert SELECTORS.parse("keydiff").score(alone(kv))[0].tolist() == pytest.approx(
        [float(one) for one in want]
    )


def test_a_slot_that_is_not_there_moves_no_mean():
    present = torch.ones(4, 1, 6, dtype=torch.bool)
    present[:, :, 2] = False
    sight = alone(contract.cache(contract.RAGGED, 6, present=present))
    sight.kv.groups[0].keys[..., 2, :] = float("nan")
    less = alone(sight.kv.take_tokens(torch.tensor([0, 1, 3, 4, 5])))
    for spec in ("keydiff", "delta"):
        one, other = (SELECTORS.parse(spec).score(replace(each, readout=mirrored)) for each in (sight, less))
        torch.testing.assert_close(one[:, [0, 1, 3, 4, 5]], other)


def test_keys_count_in_the_receivers_space_too():
    """Slot 2 differs in its keys alone, slot 0 in its values alone."""
    kv = written(keys=[[1, 0], [1, 0], [5, 0], [1, 0]], values=[[3, 0], [1, 0], [1, 0], [1, 0]])
    sight = replace(alone(kv), readout=mirrored)
    assert kept(selector("delta", proportion=0.5).plan(sight)) == [0, 2]
    assert kept(selector("proj_vnorm", proportion=0.25).plan(sight)) == [0]


def test_what_the_receiver_holds_already_is_wanted_least():
    sight = drawn()
    base = mirrored(sight.kv)
    base.groups[0].values[:, :, :, [1, 4]] += 1.0
    found = selector("oracle_delta", proportion=2 / 9).plan(replace(sight, base=base))
    assert kept(found) == [1, 4]


def test_a_receiver_of_other_slots_or_shapes_is_refused():
    sight = drawn()
    with pytest.raises(UsageError, match="there is none"):
        SELECTORS.parse("oracle_delta").plan(replace(sight, base=None))
    for base in (contract.cache(n_tokens=9), drawn(8).kv):
        with pytest.raises(ShapeMismatch, match="the same slots"):
            SELECTORS.parse("oracle_delta").plan(replace(sight, base=base))
    fewer = replace(sight, readout=lambda kv: kv.take_tokens(torch.arange(3)))
    with pytest.raises(ShapeMismatch, match="9 slots"):
        SELECTORS.parse("delta").plan(fewer)


def test_caps_are_kept():
    assert check_range(range(80)) > 25


@pytest.mark.slow
def test_ten_thousand_caps_are_kept():
    assert check_range(range(10_000)) > 3_000
