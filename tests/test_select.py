"""What every selector owes: the right number of slots, in scope, within the budget, or a typed refusal."""

import numpy as np
import pytest
import torch

from contract import cache, spans
from kvferry.codec import CODECS
from kvferry.errors import BadSpec, BudgetTooSmall, EmptyContext
from kvferry.kv import Plan, Role
from kvferry.select import SELECTORS
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Budget, alone
from kvferry.wire import pack


def kept(plan: Plan) -> list[int]:
    """The slots that any layer keeps."""
    return plan.classes.any(0).any(0).nonzero().flatten().tolist()


def int8_cost(kv):
    codec = CODECS.parse("int(bits=8)")
    return lambda plan: len(pack(codec.encode(kv, plan)))


def test_everything_is_what_no_plan_sends():
    kv, codec = cache(n_tokens=9), CODECS.parse("int(bits=4)")
    plan = SELECTORS.parse("all").plan(alone(kv))
    assert pack(codec.encode(kv, plan)) == pack(codec.encode(kv))


@pytest.mark.parametrize(("proportion", "wanted"), [(1.0, 7), (0.5, 4), (0.01, 1)])
def test_the_end_keeps_its_share(proportion, wanted):
    plan = SELECTORS.parse(f"back(proportion={proportion})").plan(alone(cache(n_tokens=7)))
    assert kept(plan) == list(range(7 - wanted, 7))


def test_sinks_are_kept_before_all_others():
    plan = SELECTORS.parse("back(proportion=0.5, sinks=2)").plan(alone(cache(n_tokens=8)))
    assert kept(plan) == [0, 1, 6, 7]


def test_a_budget_is_filled_and_never_exceeded():
    kv = cache(n_tokens=12)
    cost, selector = int8_cost(kv), SELECTORS.parse("back")
    sizes = [cost(SELECTORS.parse(f"back(proportion={n / 12})").plan(alone(kv))) for n in range(1, 13)]
    for n, size in enumerate(sizes, start=1):
        assert kept(selector.plan(alone(kv), Budget(size, cost))) == list(range(12 - n, 12))
    with pytest.raises(BudgetTooSmall) as refusal:
        selector.plan(alone(kv), Budget(sizes[0] - 1, cost))
    assert str(sizes[0]) in str(refusal.value)


def test_the_scope_leaves_out_special_and_template_tokens():
    roles = np.array([Role.SPECIAL, Role.TEMPLATE, Role.TEXT, Role.TEXT, Role.TEMPLATE], np.uint8)
    sight = alone(cache(n_tokens=5, spans=(spans(5, roles),)))
    kept_by = {
        scope: kept(SELECTORS.parse(f"all(scope={scope})").plan(sight))
        for scope in ("all_context", "prompt", "instruction_only")
    }
    assert kept_by == {"all_context": [0, 1, 2, 3, 4], "prompt": [1, 2, 3, 4], "instruction_only": [2, 3]}


def test_an_empty_scope_is_refused():
    roles = np.full(3, Role.SPECIAL, np.uint8)
    with pytest.raises(EmptyContext, match="instruction_only"):
        SELECTORS.parse("all(scope=instruction_only)").plan(
            alone(cache(n_tokens=3, spans=(spans(3, roles),)))
        )


@pytest.mark.parametrize("options", ["proportion=0.0", "proportion=1.5", "min_tokens=0", "sinks=-1"])
def test_an_impossible_option_is_refused(options):
    with pytest.raises(BadSpec):
        SELECTORS.parse(f"back({options})")


@pytest.mark.parametrize("name", SELECTORS.names())
def test_a_selector_is_its_spec(name):
    selector = SELECTORS.parse(name)
    assert SELECTORS.parse(repr(selector)) == selector
    assert SELECTORS.from_json(selector.to_json()) == selector


def test_layers_that_choose_on_their_own_keep_their_own_slots():
    class _Scored(TokenSelector):
        name = "scored"

        def score(self, sight):
            slots = torch.arange(sight.kv.n_tokens, dtype=torch.float32)
            return torch.stack([slots, -slots, slots])

    one = _Scored(proportion=0.5, per_layer=True).plan(alone(cache(n_tokens=4)))
    assert one.classes[:, 0].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
