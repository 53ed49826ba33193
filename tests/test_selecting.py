"""Sights of real models: what may be sent is what a plain sender sends; evidence lies on the tokens that were read."""

import pytest
import torch

from kvferry.codec import CODECS
from kvferry.codec.offer import Offering
from kvferry.errors import BudgetTooSmall, UsageError
from kvferry.kv import Plan
from kvferry.models.load import load
from kvferry.models.tokenizer import tokenizer_of
from kvferry.select import SELECTORS
from kvferry.session.selecting import encode_sight, look
from kvferry.session.sender import Sender
from kvferry.wire import pack

TEXTS = ["Ann has tea in Oslo. Bob has a ring in Rome.", "Eve has a coin in Lima."]


@pytest.fixture(scope="module")
def llama():
    return load("llama")


@pytest.mark.parametrize("codec", ["raw", "int(bits=4)", "ecsq"])
@pytest.mark.parametrize("onto", [None, "gemma3"])
def test_no_selection_sends_what_a_plain_sender_sends_bit_for_bit(llama, codec, onto):
    plain = Sender(llama, codec, onto).read_batch(TEXTS)
    tokenizer = None if onto is None else tokenizer_of(onto)
    sights = look(llama, TEXTS, onto=tokenizer, questions=["Where is the tea?", "Where is the coin?"])
    for selector in ("all", "back(proportion=1.0)"):
        messages = [encode_sight(CODECS.parse(codec), SELECTORS.parse(selector), sight) for sight in sights]
        assert [message.data for message in messages] == [message.data for message in plain]


def test_each_slot_carries_its_own_token_or_those_that_share_its_bytes(llama):
    own, theirs = look(llama, TEXTS)[0], look(llama, TEXTS, onto=tokenizer_of("gemma3"))[0]
    assert own.carried.sum(1).tolist() == [1] * own.kv.n_tokens
    assert own.carried.sum(0).tolist()[-own.kv.n_tokens :] == [1] * own.kv.n_tokens
    spans, read = theirs.kv.spans[0], theirs.read.spans[0]
    for slot, token in theirs.carried.nonzero().tolist():
        assert max(spans.start[slot], read.start[token]) < min(spans.end[slot], read.end[token])


def test_the_questions_queries_stand_behind_the_context(llama):
    sights = look(llama, TEXTS, questions=["Where is the tea?", "Where?"])
    for sight in sights:
        asked = sight.require_asked()
        n_asked = asked.positions.shape[1]
        assert asked.positions[0].tolist() == [sight.read.n_tokens + i for i in range(n_asked)]
        assert {queries.shape[2] for queries in asked.queries} == {n_asked}
    with pytest.raises(UsageError, match="question"):
        look(llama, TEXTS[:1])[0].require_asked()


@pytest.mark.parametrize(
    "codec", ["int(bits=4)", "int(bits=8, zstd=3)", "ecsq", "ecsq(profile=llama)", "fp8"]
)
def test_the_smallest_is_what_a_refusal_names(llama, codec):
    method = CODECS.parse(codec)
    kv = look(llama, TEXTS[:1])[0].kv
    for plan in (None, SELECTORS.parse("back(proportion=0.3)").plan(look(llama, TEXTS[:1])[0])):
        with pytest.raises(BudgetTooSmall) as refusal:
            method.encode(kv, plan, max_bytes=1)
        assert method.smallest(kv, plan) == refusal.value.smallest_bytes


@pytest.mark.parametrize("spec", ["ecsq(step=-64)", "ecsq(step=64, profile=llama)"])
def test_a_menu_tells_what_really_is_lost_and_about_what_it_costs(llama, spec):
    codec, kv = CODECS.parse(spec), look(llama, TEXTS[:1])[0].kv
    assert isinstance(codec, Offering)
    menu = codec.menu(kv)
    finer = [sum(float(bits[i].sum()) for bits in menu.bits) for i in range(len(menu.classes))]
    assert finer == sorted(finer, reverse=True)
    losses = [sum(float(error[i].sum()) for error in menu.error) for i in range(len(menu.classes))]
    assert losses[0] < losses[4] < losses[8]
    whole = torch.ones(kv.geometry.n_layers, 2, kv.n_tokens, dtype=torch.uint8)
    n_bytes = [len(pack(codec.encode(kv, Plan(whole * token_class)))) for token_class in (1, 3)]
    assert n_bytes[0] - n_bytes[1] == pytest.approx((finer[0] - finer[2]) / 8, rel=0.1)
