"""Selectors that say how finely: by hand, by sensitivity, and greedily, always in the schemes of the codec."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import contract
from kvferry.align.layer_map import LAYER_MAPS, Depths
from kvferry.cli import app
from kvferry.codec import CODECS, decode
from kvferry.errors import BadSpec, BudgetTooSmall, NotFinite, UsageError
from kvferry.kv import Group
from kvferry.models.load import load
from kvferry.select import SELECTORS
from kvferry.select.qkvcomm import QKVComm, rounded, sensitivity
from kvferry.select.rd_greedy import RdGreedy
from kvferry.select.schedule import Schedule, table
from kvferry.select.sight import Budget, Sight, alone
from kvferry.session.selecting import encode_sight
from kvferry.wire import SegmentType, unpack
from sights import drawn, seen_by
from tiny import random_rows

FIVE = ((2, 4, 6),) * 5
MIXED = CODECS.parse("mixed")
GRADED = ["schedule", "qkvcomm(window=4)", "rd_greedy"]


def budget(sight: Sight, max_bytes: int, codec=MIXED) -> Budget:
    return Budget(max_bytes, lambda plan: codec.smallest(sight.kv, plan), lambda: codec.menu(sight.kv))


def schemes_of(plan) -> list[str]:
    """The one scheme of each layer."""
    names = MIXED.schemes.split("_")
    assert all(len(layer.unique()) == 1 for layer in plan.classes)
    return [names[int(layer[0, 0]) - 1] for layer in plan.classes]


def test_a_schedule_is_carried_out_by_the_codec():
    sight = drawn(shapes=FIVE)
    plan = Schedule("int4", "0-1:int8; 3:int2", last_fp16=1).plan(sight)
    assert schemes_of(plan) == ["int8", "int8", "int4", "int2", "fp16"]
    came = decode(MIXED.encode(sight.kv, plan), sight.kv.geometry)
    for layer, spec in enumerate(["int(8)", "int(8)", "int(4)", "int(2)", "raw(float16)"]):
        want = CODECS.parse(spec).roundtrip(sight.kv).layer(layer)
        assert all(torch.equal(*pair) for pair in zip(came.layer(layer), want, strict=True))


def test_later_overrides_win_and_the_last_layers_win_over_all():
    assert Schedule("int2", "0-4:int4;1-2:int8", last_fp16=1).of_layers(5) == (
        "int4", "int8", "int8", "int4", "fp16",
    )  # fmt: skip
    assert Schedule(overrides="0:int4, 2:int3").of_layers(3) == ("int4", "int8", "int3")
    assert Schedule(last_fp16=3).of_layers(3) == ("fp16",) * 3


@pytest.mark.parametrize("options", ["overrides='24-27:fp16'", "overrides='5:int4'", "last_fp16=6"])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(options):
    with pytest.raises(UsageError, match=r"0 to [45]"):
        SELECTORS.parse(f"schedule({options})").plan(drawn(shapes=FIVE))


@pytest.mark.parametrize(
    "options", ["overrides='4-2:int8'", "overrides='int8'", "overrides='0-1=int8'", "last_fp16=-1"]
)
def test_what_is_no_schedule_is_refused(options):
    with pytest.raises(BadSpec):
        SELECTORS.parse(f"schedule({options})")


@pytest.mark.parametrize(
    "spec",
    [
        "schedule(default=int5)",
        "schedule(overrides='0:int6', schemes=int8_int4)",
        "schedule(last_fp16=1, schemes=int8_int4)",
        "qkvcomm(schemes=int8_int4)",
        "rd_greedy(candidates=int8_int1)",
    ],
)
def test_a_scheme_that_the_codec_does_not_have_is_refused(spec):
    with pytest.raises(BadSpec, match="unknown scheme"):
        SELECTORS.parse(spec)


@pytest.mark.parametrize("spec", GRADED)
def test_codecs_that_mean_other_schemes_are_refused(spec):
    sight, selector = drawn(), SELECTORS.parse(spec)
    encode_sight(MIXED, selector, sight)
    for other in ("mixed(int8_int6_int4)", "int(bits=8)", "ecsq"):
        with pytest.raises(UsageError, match="schemes"):
            encode_sight(CODECS.parse(other), selector, sight)
    few = CODECS.parse("mixed(int8_int6_int4)")
    encode_sight(few, replace(selector, schemes=few.schemes), sight)
    with pytest.raises(UsageError, match="no precision classes"):
        selector.plan(sight, Budget(10**6, lambda plan: 0))


@pytest.mark.parametrize("spec", [*GRADED, "schedule(int4, overrides='0:int8')"])
def test_a_budget_is_kept_or_refused_with_one_that_will_do(spec):
    sight, selector = drawn(shapes=FIVE), SELECTORS.parse(spec)
    with pytest.raises(BudgetTooSmall) as refusal:
        encode_sight(MIXED, selector, sight, 200)
    enough = refusal.value.smallest_bytes
    assert len(encode_sight(MIXED, selector, sight, enough).data) <= enough
    with pytest.raises(BudgetTooSmall):
        encode_sight(MIXED, selector, sight, enough - 1)


@pytest.mark.parametrize("spec", GRADED)
def test_what_is_out_of_scope_is_not_sent(spec):
    roles = torch.tensor([1, 0, 0, 2, 0, 0, 0, 0, 0]).numpy().astype("uint8")
    plan = replace(SELECTORS.parse(spec), scope="instruction_only").plan(drawn(roles=roles))
    assert (plan.classes > 0).all(0).all(0).tolist() == [role == 0 for role in roles]


@pytest.mark.parametrize("spec", GRADED)
def test_specs(spec):
    contract.check_spec(SELECTORS, SELECTORS.parse(spec))


def test_the_table_names_layers_on_both_sides():
    schemes = Schedule("int8", "2-3:fp16").of_layers(4)
    text = table(schemes, LAYER_MAPS.parse("terminal")(Depths(n_sender=4, n_receiver=6)))
    assert text.splitlines() == [
        "sender 0-1: int8",
        "sender 2-3: fp16",
        "receiver 0 reads nothing",
        "receiver 1 reads nothing",
        "receiver 2 reads sender 0: int8",
        "receiver 3 reads sender 1: int8",
        "receiver 4 reads sender 2: fp16",
        "receiver 5 reads sender 3: fp16",
    ]
    with pytest.raises(UsageError, match="0 to 3"):
        table(schemes, [[4]])


def test_the_command_prints_it():
    words = ["schedule", "schedule(int4, last_fp16=1)", "--receiver", "qwen3", "--layer-map", "terminal"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    n_layers = load("llama").geometry.n_layers
    assert f"sender {n_layers - 1}: fp16" in done.output.splitlines()
    last = load("qwen3").geometry.n_layers - 1
    assert done.output.splitlines()[-1] == f"receiver {last} reads sender {n_layers - 1}: fp16"
    done = CliRunner().invoke(app, ["schedule", "back"])
    assert done.exit_code == 2 and "no schedule" in done.output


@pytest.mark.parametrize(
    ("n_layers", "wanted"),
    [(10, [3, 4, 3]), (28, [8, 12, 8]), (3, [1, 1, 1]), (2, [1, 0, 1]), (1, [0, 1, 0])],
)
def test_layers_are_graded_in_order_of_harm(n_layers, wanted):
    harms = torch.rand(n_layers)
    classes = QKVComm().grade(harms)
    assert [int((classes == one).sum()) for one in (2, 3, 4)] == wanted
    assert classes[harms.argsort(descending=True)].tolist() == sorted(classes.tolist())


def test_the_layer_whose_rounding_attention_feels_is_sent_finest():
    """Sharper attention feels the rounding of keys more; larger values change nothing, for errors are relative."""
    sight = drawn(shapes=FIVE, n_slots=24)
    (group,) = sight.read.groups
    larger = replace(sight, read=sight.read.with_groups((Group(group.layers, group.keys, 8 * group.values),)))
    before, after = (sensitivity(one, bits=4, window=6) for one in (sight, larger))
    torch.testing.assert_close(before, after)
    keys = group.keys.clone()
    keys[1] *= 8
    harmed = replace(sight, read=sight.read.with_groups((Group(group.layers, keys, group.values),)))
    assert int(sensitivity(harmed, bits=4, window=6).argmax()) == 1
    assert schemes_of(QKVComm(window=6).plan(harmed))[1] == "int8"


def test_more_bits_do_less_harm_and_16_none_worth_speaking_of():
    (sight,) = seen_by("llama", random_rows(1, 20))
    harms = [sensitivity(sight, bits, window=8) for bits in (2, 4, 8, 16)]
    assert all(bool((finer < coarser).all()) for coarser, finer in pairwise(harms))
    assert bool((harms[-1] < 1e-3).all())


def test_tokens_that_are_not_sent_are_not_rounded():
    sight = drawn()
    nothing = replace(sight, carried=torch.zeros_like(sight.carried))
    assert sensitivity(nothing, bits=2, window=4).tolist() == [0.0, 0.0, 0.0]


def test_rounding_is_that_of_the_codec():
    numbers = contract.cache(((2, 8, 8),), n_tokens=9).groups[0].keys
    coded = CODECS.parse("int(4, group=0)").roundtrip(contract.cache(((2, 8, 8),), n_tokens=9)).groups[0].keys
    torch.testing.assert_close(rounded(numbers, 4), coded, atol=2e-3, rtol=2e-3)


def test_layers_that_are_broken_are_named():
    sight = drawn()
    sight.read.groups[0].values[1] = float("nan")
    with pytest.raises(NotFinite, match="layer 1"):
        QKVComm(window=4).plan(sight)


@pytest.mark.parametrize(
    "options",
    ["shares=(0.5, 0.5)", "shares=(0.5, 0.4, 0.3)", "bits=(4, 6, 8)", "window=0", "shares=(1, 0, 0)"],
)
def test_impossible_grades_are_refused(options):
    with pytest.raises(BadSpec):
        SELECTORS.parse(f"qkvcomm({options})")


def test_the_greedy_allocation_is_the_choice_of_the_best_in_one_precision():
    """Whatever the budget, one slot at most is in int4; the others are the best that fit in int8, or one fewer."""
    sight = drawn(n_slots=40, shapes=FIVE)
    least = MIXED.smallest(sight.kv, SELECTORS.parse("vnorm(proportion=0.01)").plan(sight))
    whole = MIXED.smallest(sight.kv)
    n_coarse = []
    for max_bytes in range(least + 60, whole, (whole - least) // 40):
        plan = RdGreedy("vnorm").plan(sight, budget(sight, max_bytes))
        assert MIXED.smallest(sight.kv, plan) <= max_bytes
        kept = (plan.classes > 0).any(0).any(0)
        n_kept = int(kept.sum())
        best = SELECTORS.parse(f"vnorm(proportion=0.001, min_tokens={n_kept})").plan(sight)
        assert torch.equal(kept, (best.classes > 0).any(0).any(0))
        n_coarse.append(int((plan.classes == RdGreedy().class_of("int4")).any(0).any(0).sum()))
        fine = SELECTORS.parse("vnorm").plan(sight, budget(sight, max_bytes, CODECS.parse("mixed(int8)")))
        assert 0 <= n_kept - int((fine.classes > 0).any(0).any(0).sum()) <= 1
    assert set(n_coarse) == {0, 1}


def test_the_greedy_allocation_without_a_budget_sends_all_in_the_first_candidate():
    assert schemes_of(RdGreedy(candidates="int6_int3").plan(drawn())) == ["int6"] * 3
    with pytest.raises(BadSpec, match="scores"):
        RdGreedy("every_kth")


def test_classes_are_written_once_for_a_schedule():
    sight = alone(contract.cache(FIVE, n_tokens=30))
    message = encode_sight(MIXED, Schedule("int4", "0-1:int8"), sight)
    assert len(unpack(message.data).body(SegmentType.CLASSES)) < 10
