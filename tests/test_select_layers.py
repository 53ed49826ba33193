"""Selectors of whole layers, and the policy that decides how many slots."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import contract
from kvferry.codec import CODECS
from kvferry.errors import BadSpec, BudgetTooSmall, NotFinite, ShapeMismatch
from kvferry.kv import KV, Group, Plan
from kvferry.select import SELECTORS
from kvferry.select.adaptive import Adaptive, content_change, richness, room, share
from kvferry.select.sensitive_layers import SensitiveLayers
from kvferry.select.sight import Budget, Sight, alone
from sights import OF_LAYERS, drawn, permuted, seen_by
from tiny import random_rows

FIVE = ((1, 2, 2),) * 5
UNIT = st.floats(0.0, 1.0)


def layers_of(plan: Plan) -> list[int]:
    return plan.classes.any(-1).any(-1).nonzero().flatten().tolist()


def budget(sight: Sight, max_bytes: int) -> Budget:
    codec = CODECS.parse("int(bits=8)")
    return Budget(max_bytes, lambda plan: codec.smallest(sight.kv, plan))


def with_values(values: list[list[float]]) -> KV:
    kv = contract.cache(((1, 2, len(values[0])),), len(values))
    return kv.with_groups((Group((0,), kv.groups[0].keys, torch.tensor(values)[None, None, None]),))


@pytest.mark.parametrize("spec", OF_LAYERS)
def test_chosen_layers_are_whole_and_the_others_empty(spec):
    sight = drawn(shapes=FIVE)
    classes = SELECTORS.parse(spec).plan(sight).classes
    assert layers_of(Plan(classes)) != list(range(5))
    assert all(len(layer.unique()) == 1 for layer in classes)


@pytest.mark.parametrize(("share", "n_kept"), [(0.01, 1), (0.2, 1), (0.21, 2), (0.6, 3), (1.0, 5)])
def test_a_share_of_the_layers_is_rounded_up(share, n_kept):
    for name in ("kvcomm", "sensitive_layers"):
        plan = SELECTORS.parse(f"{name}(share={share})").plan(drawn(shapes=FIVE))
        assert len(layers_of(plan)) == n_kept


def test_the_numbers_handed_in_decide():
    sight = drawn(shapes=FIVE)
    plan = SensitiveLayers(sensitivity=(0.1, 0.9, 0.3, 0.9, 0.2), share=0.6).plan(sight)
    assert layers_of(plan) == [1, 2, 3]
    with pytest.raises(BadSpec, match="2 layers for a model of 5"):
        SensitiveLayers(sensitivity=(0.1, 0.9)).plan(sight)
    with pytest.raises(NotFinite, match="layer 2"):
        SensitiveLayers(sensitivity=(0.1, 0.9, float("nan"), 0.9, 0.2)).plan(sight)


def test_numbers_travel_in_a_spec():
    asked = SELECTORS.parse("sensitive_layers([0.5, 1, 0.25], share=0.3)")
    assert asked == SensitiveLayers(sensitivity=(0.5, 1.0, 0.25), share=0.3)
    contract.check_spec(SELECTORS, asked)


@pytest.mark.parametrize("spec", ["kvcomm(share=1.0)", "every_kth(k=1)", "sensitive_layers(share=1.0)"])
def test_a_budget_takes_as_many_layers_as_it_has_room_for(spec):
    sight = drawn(shapes=FIVE)
    order, codec = SELECTORS.parse(spec).wanted(sight), CODECS.parse("int(bits=8)")
    sizes = []
    for n in range(1, 6):
        plan = Plan.everything(sight.kv)
        plan.classes[order[n:]] = 0
        sizes.append(codec.smallest(sight.kv, plan))
    for n, size in enumerate(sizes, start=1):
        found = SELECTORS.parse(spec).plan(sight, budget(sight, size))
        assert layers_of(found) == sorted(order[:n])
    with pytest.raises(BudgetTooSmall, match=str(sizes[0])):
        SELECTORS.parse(spec).plan(sight, budget(sight, sizes[0] - 1))


@given(*[UNIT] * 3, st.floats(0.01, 1.0), st.sampled_from([0, 1, 2]), UNIT)
def test_more_of_any_reason_is_never_fewer_slots(change, rich, space, proportion, which, more):
    given_ = [change, rich, space]
    raised = list(given_)
    raised[which] = max(given_[which], more)
    assert share(proportion, *raised) >= share(proportion, *given_)
    assert 0 <= share(proportion, *given_) <= min(space, 4 * proportion, 1.0)


def test_a_text_that_grows_has_changed_where_it_grew():
    [row] = random_rows(1, 16)
    [before], [now] = seen_by("llama", [row[:12]]), seen_by("llama", [row])
    assert content_change(before.kv, before.kv) == 0.0
    assert content_change(now.kv, before.kv) == pytest.approx(4 / 15)
    [other] = seen_by("llama", random_rows(1, 16))
    assert content_change(now.kv, other.kv) > 0.9
    with pytest.raises(ShapeMismatch):
        content_change(now.kv, drawn().kv)


def test_the_start_of_another_text_changes_all_that_follows():
    [row] = random_rows(1, 16)
    changed = [*row[:8], (row[8] + 1) % 90 + 3, *row[9:]]
    [before], [now] = seen_by("llama", [row]), seen_by("llama", [changed])
    assert content_change(now.kv, before.kv) == pytest.approx(8 / 15)


def test_richness_is_the_number_of_directions():
    assert richness(with_values([[1.0, 0.0, 0.0]] * 6)) == pytest.approx(1 / 3)
    assert richness(with_values([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])) == pytest.approx(1.0)
    assert richness(with_values([[1.0, 0, 0], [0, 5.0, 0], [0, 0, 1e-9]])) < 2 / 3
    sight = drawn(12)
    order = torch.randperm(12)
    assert richness(permuted(sight, order).kv) == pytest.approx(richness(sight.kv))


def test_richness_of_repetition_is_less_than_that_of_a_text():
    [poor], [rich] = seen_by("llama", [[5] * 20]), seen_by("llama", random_rows(1, 20))
    assert richness(poor.kv) < 0.5 * richness(rich.kv)


def test_room_is_a_share_of_everything():
    sight = drawn()
    everything = Plan.everything(sight.kv)
    whole = CODECS.parse("int(bits=8)").smallest(sight.kv, everything)
    assert room(everything, None) == room(everything, budget(sight, 2 * whole)) == 1.0
    assert room(everything, budget(sight, whole // 2)) == pytest.approx(0.5, abs=0.01)


def test_the_policy_keeps_the_share_that_its_reasons_give():
    sight = drawn(40)
    policy = Adaptive("vnorm(proportion=0.2)", change=0.3)
    wanted = share(0.2, 0.3, richness(sight.kv), 1.0)
    plan = policy.plan(sight)
    assert torch.equal(plan.classes, SELECTORS.parse(f"vnorm(proportion={wanted})").plan(sight).classes)
    assert policy.since(sight, sight) == Adaptive("vnorm(proportion=0.2)", change=0.0)
    assert plan.classes.sum() > policy.since(sight, sight).plan(sight).classes.sum()


def test_the_policy_keeps_more_the_more_bytes_there_are():
    sight = drawn(30)
    policy = Adaptive("back(proportion=0.9)")
    whole = CODECS.parse("int(bits=8)").smallest(sight.kv, Plan.everything(sight.kv))
    sizes = []
    for max_bytes in range(whole // 3, whole, 40):
        plan = policy.plan(sight, budget(sight, max_bytes))
        assert budget(sight, max_bytes).cost(plan) <= max_bytes
        sizes.append(int(plan.classes[0, 0].sum()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_the_policy_asks_for_what_its_selector_needs():
    assert Adaptive("question").reads_question and not Adaptive("back").reads_question
    assert Adaptive("value_aware").needs == ("attention_mass",)
    contract.check_spec(SELECTORS, Adaptive("snapkv(window=4, proportion=0.1)", change=0.5))


def test_the_policy_has_the_scope_that_it_says():
    roles = contract.spans(6, torch.tensor([1, 0, 0, 0, 0, 1], dtype=torch.uint8).numpy())
    sight = alone(replace(contract.cache(n_tokens=6), spans=(roles,)))
    plan = Adaptive("back(proportion=1.0)", scope="prompt").plan(sight)
    assert plan.classes[0, 0].tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("spec", ["adaptive(change=1.5)", "adaptive(inner=all)", "adaptive(inner=every_kth)"])
def test_an_impossible_policy_is_refused(spec):
    with pytest.raises(BadSpec):
        SELECTORS.parse(spec)
