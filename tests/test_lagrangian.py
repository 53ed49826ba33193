"""Allocation by rate and distortion: never worse than simpler ways at equal bytes, the best where all can be tried."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from contract import cache
from kvferry.codec import CODECS
from kvferry.errors import BudgetTooSmall, FolderError, ForeignModel, UsageError
from kvferry.kv import Plan
from kvferry.models.load import load
from kvferry.select import SELECTORS
from kvferry.select.importance import IMPORTANCES, Importance
from kvferry.select.sight import Budget, alone
from kvferry.session.selecting import encode_sight, plan_of
from kvferry.session.sender import Sender
from kvferry.wire import pack

quick = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
MIXED = CODECS.parse("mixed(schemes=int8_int4_int2, group=4)")


def loss(kv, menu, plan) -> float:
    """What a plan loses by a menu without steps: each layer's keys and values count by their own deviation."""
    total = 0.0
    for layer in range(kv.geometry.n_layers):
        for which, numbers in enumerate(kv.layer(layer)):
            away = (numbers[0] - numbers[0].mean(1, keepdim=True)).square().sum((0, 2))
            for slot in range(kv.n_tokens):
                one = int(plan.classes[layer, which, slot])
                own = (
                    away[slot]
                    if one == 0
                    else menu.error[layer][menu.classes.index(one), which, :, slot].sum()
                )
                total += float(own / away.mean())
    return total


def taken(menu, plan) -> float:
    """Ideal bits of a plan."""
    return sum(
        float(menu.bits[layer][menu.classes.index(int(one)), which, :, slot].sum())
        for layer, rows in enumerate(plan.classes)
        for which, row in enumerate(rows)
        for slot, one in enumerate(row)
        if one
    )


@quick
@given(seed=st.integers(0, 10_000), max_bytes=st.integers(10, 60))
def test_it_is_the_best_of_all_plans_of_its_structure_where_all_can_be_tried(seed, max_bytes):
    kv = cache(shapes=((1, 4, 4),), n_tokens=3, seed=seed)
    menu = MIXED.menu(kv)

    def cost(plan):
        return math.ceil(taken(menu, plan) / 8)

    plan = SELECTORS.parse("lagrangian").plan(alone(kv), Budget(max_bytes, cost, lambda: menu))
    rivals = []
    for moves in itertools.product(range(3), repeat=2):
        for choice in itertools.product(range(4), repeat=3):
            rows = [[0 if c == 0 else min(c + move, 3) for c in choice] for move in moves]
            rival = Plan(torch.tensor([rows], dtype=torch.uint8))
            if rival.classes.any() and cost(rival) <= max_bytes:
                rivals.append(loss(kv, menu, rival))
    assert cost(plan) <= max_bytes
    assert loss(kv, menu, plan) <= min(rivals) * (1 + 1e-5) + 1e-9


@quick
@given(seed=st.integers(0, 10_000), share=st.floats(0.4, 1.0))
def test_it_is_never_worse_than_one_class_for_all_nor_than_greedy_at_equal_bytes(seed, share):
    kv = cache(n_tokens=9, seed=seed)
    sight, menu = alone(kv), MIXED.menu(kv)
    max_bytes = max(int(share * MIXED.smallest(kv)), 230)
    budget = Budget(max_bytes, lambda plan: MIXED.smallest(kv, plan), lambda: menu)
    plan = SELECTORS.parse("lagrangian").plan(sight, budget)
    assert len(pack(MIXED.encode(kv, plan, max_bytes))) <= max_bytes
    rivals = [Plan(torch.full_like(plan.classes, one)) for one in menu.classes]
    rivals.append(
        SELECTORS.parse("rd_greedy(candidates=int8_int4, schemes=int8_int4_int2)").plan(sight, budget)
    )
    for rival in rivals:
        if budget.cost(rival) <= max_bytes:
            assert loss(kv, menu, plan) <= loss(kv, menu, rival) * (1 + 1e-5)


@quick
@given(seed=st.integers(0, 10_000), n_tokens=st.integers(1, 20), max_bytes=st.integers(100, 900))
def test_a_cap_is_held_or_refused_with_one_that_would_do(seed, n_tokens, max_bytes):
    sight = alone(cache(n_tokens=n_tokens, seed=seed))
    selector, codec = SELECTORS.parse("lagrangian"), CODECS.parse("ecsq")
    cap = max_bytes
    try:
        message = encode_sight(codec, selector, sight, cap)
    except BudgetTooSmall as refusal:
        cap = refusal.smallest_bytes
        message = encode_sight(codec, selector, sight, cap)
    assert len(message) <= cap


def test_without_a_cap_everything_is_sent_as_without_a_selector():
    kv, codec = cache(n_tokens=6), CODECS.parse("ecsq")
    message = encode_sight(codec, SELECTORS.parse("lagrangian"), alone(kv))
    assert message.data == pack(codec.encode(kv))


@quick
@given(seed=st.integers(0, 99), n_tokens=st.integers(1, 9), spare=st.integers(0, 400), mixed=st.booleans())
def test_without_drops_every_slot_is_sent(seed, n_tokens, spare, mixed):
    kv, codec = cache(n_tokens=n_tokens, seed=seed), MIXED if mixed else CODECS.parse("ecsq")
    selector, cap = SELECTORS.parse("lagrangian(drops=False)"), 60 + spare
    try:
        message = encode_sight(codec, selector, alone(kv), cap)
    except BudgetTooSmall as refusal:
        cap = refusal.smallest_bytes
        message = encode_sight(codec, selector, alone(kv), cap)
    assert message.frame.n_tokens == n_tokens and len(message) <= cap


def test_a_codec_without_classes_is_refused():
    with pytest.raises(UsageError, match="no precision classes"):
        encode_sight(CODECS.parse("int(bits=4)"), SELECTORS.parse("lagrangian"), alone(cache()), 400)


@pytest.fixture
def folder(tmp_path):
    """One that wants the last slots: every octave of distance from the end is one of the step."""
    kv = cache(n_tokens=8)
    importance = Importance(kv.geometry)
    with torch.no_grad():
        importance.inner.weight.zero_()
        importance.inner.bias.zero_()
        importance.inner.weight[0, -2] = 1.0
        importance.outer.weight[0, 0] = 8.0
    IMPORTANCES.save(importance, kv.geometry, {"grid": "sender"}, tmp_path / "importance", "A card.")
    return tmp_path / "importance"


def test_an_importance_decides_what_a_small_message_keeps(folder):
    kv, codec = cache(n_tokens=8), CODECS.parse("ecsq")
    cap = codec.smallest(kv) + 20
    specs = ("lagrangian", f"lagrangian(importance={str(folder)!r})")
    plain, valued = (kept_slots(codec, spec, kv, cap) for spec in specs)
    octaves = IMPORTANCES.load(folder, kv.geometry)(kv)[0]
    assert octaves.argsort().tolist() == list(range(7, -1, -1))
    assert 1 <= len(valued) < kv.n_tokens
    assert valued == list(range(kv.n_tokens))[-len(valued) :] != plain


def kept_slots(codec, spec, kv, cap) -> list[int]:
    plan = plan_of(codec, SELECTORS.parse(spec), alone(kv), cap)
    return plan.classes.flatten(0, 1).any(0).nonzero().flatten().tolist()


def test_an_importance_of_another_grid_is_refused(folder):
    kv = cache(n_tokens=8)
    spans = tuple(replace(row, overlap=np.zeros(len(row), np.uint8)) for row in kv.spans)
    with pytest.raises(ForeignModel, match="sender's tokens"):
        IMPORTANCES.load(folder, kv.geometry)(replace(kv, spans=spans))


def test_an_importance_of_another_sender_is_refused(folder):
    with pytest.raises(ForeignModel, match="fit-importance"):
        IMPORTANCES.load(folder, cache(shapes=((1, 2, 2),)).geometry)


def test_a_sender_refuses_what_its_selector_lacks_before_it_reads(folder, tmp_path):
    llama = load("llama")
    for spec, error, what in (
        (f"lagrangian(importance={str(folder)!r})", ForeignModel, "fitted for model"),
        (f"lagrangian(importance={str(tmp_path / 'none')!r})", UsageError, "fit-importance --out"),
        (f"adaptive(inner='lightning(indexer=\"{tmp_path / 'none'}\")')", UsageError, "fit-indexer --out"),
        ("lightning", UsageError, "without an indexer"),
    ):
        with pytest.raises(error) as refused:
            Sender(llama, "ecsq", select=spec)
        assert what in str(refused.value)
    with pytest.raises(UsageError, match=r"int\(bits=4\) has no precision classes for lagrangian"):
        Sender(llama, "int(bits=4)", select="lagrangian")


def test_a_corrupt_or_missing_folder_is_refused(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(FolderError):
        IMPORTANCES.load(folder, cache().geometry)
    with pytest.raises(FolderError):
        IMPORTANCES.load(tmp_path / "nowhere", cache().geometry)
