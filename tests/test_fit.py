"""Fitting end to end on small random and trained models; quality is measured by the demo, not here."""

import json
from itertools import islice

import pytest
import torch

from kvferry.errors import UsageError
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.load import load
from kvferry.models.prompt import PLAIN
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.train.answer_loss import answer_scores, continuations
from kvferry.train.card import card
from kvferry.train.examples import QuestionFile, TextFile, Worlds, source_of
from kvferry.train.fit import Pair, Recipe, fit, mean_cache
from kvferry.train.fit import _sent as sent

RECIPE = Recipe(
    codecs=(
        "raw(dtype=float16, zstd=0)",
        "int(bits=8, group=32, axis=token, centred=False, scale=float16, zstd=0)",
    ),
    n_texts=32,
    steps=4,
    batch_size=4,
    neighbours=2,
)


@pytest.fixture(scope="module")
def models():
    return load("llama"), load("qwen3")


@pytest.fixture(scope="module")
def fitted(models):
    losses = []
    before = model_fingerprint(models[1].hf, models[1].geometry.layers)
    result = fit(*models, Worlds(), RECIPE, on_step=lambda step, loss: losses.append(loss))
    assert model_fingerprint(models[1].hf, models[1].geometry.layers) == before
    assert len(losses) == RECIPE.steps
    return result


def test_the_contract_names_models_codecs_and_stride(models, fitted):
    contract = fitted.aligner.contract
    assert (contract.sender, contract.receiver) == (models[0].geometry, models[1].geometry)
    assert contract.coded_with == RECIPE.codecs
    assert contract.stride == 1.0, "both have one tokenizer"


def test_a_fit_is_decided_by_its_seed(models, fitted):
    again = fit(*models, Worlds(), RECIPE)
    assert torch.equal(again.aligner.weight, fitted.aligner.weight)
    other = fit(*models, Worlds(), Recipe(**{**RECIPE.__dict__, "seed": 1}))
    assert not torch.equal(other.aligner.weight, fitted.aligner.weight)


def test_a_fit_beats_its_control(fitted):
    own, zero_pad, mean = fitted.controls
    for row in fitted.ridge_scores:
        assert own.loss < row.loss < min(zero_pad.loss, mean.loss)


def test_the_card_says_how_it_was_made(fitted):
    text = card(fitted, "llama", "qwen3", "kvferry fit ...")
    for word in (
        *RECIPE.codecs,
        "control: mean cache",
        "kvferry fit ...",
        "penalty",
        "1.0000 receiver tokens",
    ):
        assert word in text


def test_what_was_fitted_answers_through_the_session(models, fitted):
    receiver = Receiver(models[1], fitted.aligner)
    codec = fitted.aligner.contract.coded_with[0]
    reply = receiver.answer(Sender(models[0], codec).read("Ann has tea in Oslo."), "Where is the tea?")
    assert reply.stages_ms.keys() == {"decode", "align", "prefill", "generate"}


def test_the_mean_cache_has_no_content(models):
    examples = list(islice(Worlds().examples("dev", 0), 4))
    mean = mean_cache(sent(models[0], examples))
    keys = mean.layer(0)[0]
    assert torch.equal(keys[0, :, -1], keys[3, :, -2])


def test_a_perfect_cache_scores_as_the_receivers_own_reading(models):
    """The scorer itself: the receiver's own cache must give nearly every answer."""
    pair = Pair(models[1], models[1], Worlds(), RECIPE)
    examples = [e for e in islice(Worlds().examples("test", 3), 64) if "How many" not in str(e.pieces)]
    own = sent(models[1], examples)
    got = answer_scores(models[1], own, continuations(models[1], examples), 1.0)
    assert pair.receiver is models[1] and got.n_right / got.n_pieces > 0.9
    shuffled = answer_scores(
        models[1], own.take_batch(list(range(len(examples)))[::-1]), continuations(models[1], examples), 1.0
    )
    assert shuffled.n_right / shuffled.n_pieces < 0.5


WRONG = [
    {"codecs": ()},
    {"n_texts": 0},
    {"steps": -1},
    {"batch_size": 0},
    {"learning_rate": 0.0},
    {"neighbours": 0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_recipes_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="out of range"):
        Recipe(**wrong)


def test_a_loss_that_is_no_number_stops_the_fit(models, monkeypatch):
    monkeypatch.setattr("kvferry.train.fit._rate", lambda step, n_steps: float("inf"))
    with pytest.raises(UsageError, match="the loss is nan at step"):
        fit(*models, Worlds(), RECIPE)


def test_text_files_give_disjoint_passages(tmp_path):
    words = " ".join(f"word{i}" for i in range(40_000))
    path = tmp_path / "text.txt"
    path.write_text(words)
    source = TextFile(path)
    seen = {
        split: {e.context for e in islice(source.examples(split, 0), 20)}
        for split in ("train", "dev", "test")
    }
    assert not seen["train"] & seen["test"]
    example = next(source.examples("train", 0))
    assert example.context + "".join(text for text, _ in example.pieces) in words
    path.write_text("short")
    with pytest.raises(UsageError, match="characters of text"):
        next(source.examples("dev", 0))


def test_texts_without_spaces_are_cut_between_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("北京的故事很长。" * 4000, encoding="utf-8")
    example = next(TextFile(path).examples("train", 0))
    assert example.context and all(text for text, _ in example.pieces)


def test_question_files_are_read_line_by_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"context": f"c{i}", "question": f"q{i}", "answer": i} for i in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = source_of(path, PLAIN)
    assert isinstance(source, QuestionFile)
    assert {e.context for e in islice(source.examples("dev", 0), 30)} == {"c9", "c19"}
    assert {e.context for e in islice(source.examples("test", 0), 30)} == {"c8", "c18"}
    path.write_text('{"context": "c"}')
    with pytest.raises(UsageError, match="line 1"):
        next(source.examples("train", 0))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere"):
        next(source_of(tmp_path / "nowhere.txt", PLAIN).examples("train", 0))
