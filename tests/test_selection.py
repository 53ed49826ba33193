"""Selections that maps are trained behind: what a message keeps, in training too."""

import pytest
import torch

from contract import cache
from kvferry.codec import CODECS, decode
from kvferry.errors import UnknownName, UsageError
from kvferry.kv import stack
from kvferry.models.load import load
from kvferry.select import SELECTORS
from kvferry.select.sight import alone
from kvferry.session.selecting import encode_sight, look
from kvferry.train.examples import Worlds
from kvferry.train.fit import fit
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.selection import select, selection_of

SPECS = ("knorm(keep=high, proportion=0.5)", "back(proportion=0.3, sinks=1)", "random(proportion=0.4)")


@pytest.mark.parametrize("spec", SPECS)
def test_what_training_keeps_is_what_a_message_brings(spec):
    rows, codec = [cache(n_tokens=9, seed=1), cache(n_tokens=6, seed=2)], CODECS.parse("raw")
    kept = select(selection_of(spec), stack(rows))
    messages = [encode_sight(codec, SELECTORS.parse(spec), alone(row)) for row in rows]
    came = stack([decode(message.frame, rows[0].geometry) for message in messages])
    assert torch.equal(kept.present, came.present)
    assert torch.equal(kept.positions * kept.present[:1], came.positions * came.present[:1])
    for layer in range(kept.geometry.n_layers):
        for mine, theirs in zip(kept.layer(layer), came.layer(layer), strict=True):
            held = kept.present[layer].unsqueeze(1).unsqueeze(-1)
            assert torch.equal(mine * held, theirs * held)


def test_all_leaves_the_batch_as_it_is():
    kv = stack([cache(n_tokens=4), cache(n_tokens=3)])
    assert select(selection_of("all"), kv) is kv


@pytest.mark.parametrize("spec", ["snapkv", "question", "lagrangian", "every_kth", "lightning"])
def test_what_a_cache_alone_does_not_decide_is_refused(spec):
    with pytest.raises(UsageError, match=spec):
        selection_of(spec)


def test_selections_without_training_are_refused():
    with pytest.raises(UsageError, match="0 steps"):
        FitRecipe("linear", ("raw",), selections=("back",), loop=LoopRecipe(steps=0))
    with pytest.raises(UnknownName, match="bakc"):
        FitRecipe("linear", ("raw",), selections=("bakc",))


def test_a_lot_is_the_same_for_one_text_and_another_for_the_next():
    texts = ("Bob has the lamp. Eve has the coin.", "Eve has the lamp. Zoe keeps a drum.")
    lot = SELECTORS.parse("random(proportion=0.5)")
    llama = load("llama")
    first, again, other = (lot.score(look(llama, [text])[0])[0] for text in (texts[0], texts[0], texts[1]))
    assert torch.equal(first, again)
    n = min(len(first), len(other))
    assert not torch.equal(first[:n], other[:n])


def test_training_takes_turns_in_selections(monkeypatch):
    llama, qwen = load("llama"), load("qwen3")
    asked: list[str] = []

    def heard(selector, kv):
        if kv.n_batch == 2:  # a step, and not the dev examples
            asked.append(selector.name)
        return select(selector, kv)

    monkeypatch.setattr("kvferry.train.fit.select", heard)
    recipe = FitRecipe(
        "linear",
        ("raw", "int(bits=8)"),
        selections=("all", "back(proportion=0.5)"),
        data=DataRecipe(texts=8, batch_size=2),
        loop=LoopRecipe(steps=6, learning_rate=1e-4, warmup=1),
    )
    fit(llama, qwen, Worlds(n_alike=2), recipe)
    assert asked == ["all", "all", "back", "back", "all", "all"]
