"""Choosing among maps: by answers, under a size, and the verdict beside the table of tokens."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from typer.testing import CliRunner

from kvferry.align.folder import load_aligner
from kvferry.cli import app
from kvferry.errors import UsageError
from kvferry.models.load import Model, load
from kvferry.train import auto
from kvferry.train import fit as fitting
from kvferry.train.auto import NEIGHBOURS, Candidate, Choice, choose, megabytes
from kvferry.train.closed import neighbours_of
from kvferry.train.examples import Example, Split, Worlds
from kvferry.train.fit import closed_form
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe, aligner_call
from kvferry.train.report import report_choice

RECIPE = FitRecipe(
    "linear",
    ("raw(dtype=float16)", "int(bits=8)"),
    DataRecipe(texts=96, batch_size=2),
    loop=LoopRecipe(steps=0),
)
SMALL, LARGE, PERCEPTRON = "low_rank(rank=32)", "linear(neighbours=1)", "residual_mlp(neighbours=1, hidden=4)"


@dataclass(frozen=True)
class Short:
    """Short texts; `apart` gives each one the questions about another."""

    name: str = "short"
    apart: bool = False

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        found = Worlds(n_questions=3, n_alike=4).examples(split, seed)
        found = (example for example in found if len(example.context) <= 130)
        for example in found:
            yield replace(example, context=next(found).context) if self.apart else example


@pytest.fixture(scope="module", autouse=True)
def little_to_try():
    """Maps that are fitted in a moment, and few examples to measure them on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "CLOSED", (SMALL, LARGE))
        patch.setattr(auto, "ON_RECEIVER_GRID", ("classwise",))
        patch.setattr(auto, "TRAINED", PERCEPTRON)
        patch.setattr(auto, "TRAINED_BY_CLASS", PERCEPTRON)
        patch.setattr(auto, "NEIGHBOURS", 1)
        patch.setattr(fitting, "PENALTIES", (1e-4, 1e-2))
        for module in (auto, fitting):
            patch.setattr(module, "N_HELD_OUT", 32)
        for module in ("auto", "report"):
            patch.setattr(f"kvferry.train.{module}.N_FIDELITY", 4)
        yield


every_candidate = (*auto.CLOSED, *auto.ON_RECEIVER_GRID, auto.TRAINED, auto.TRAINED_BY_CLASS)


@pytest.mark.parametrize("spec", every_candidate)
def test_every_candidate_exists_and_reads_no_more_tokens_than_are_paired(spec):
    aligner_call(spec)
    assert neighbours_of(spec) <= NEIGHBOURS


@pytest.fixture(scope="module")
def llama() -> Model:
    return load("llama")


@pytest.fixture(scope="module")
def gemma() -> Model:
    return load("gemma3")


@pytest.fixture(scope="module")
def qwen() -> Model:
    return load("qwen3")


@pytest.fixture(scope="module")
def told() -> list[Candidate]:
    return []


@pytest.fixture(scope="module")
def choice(llama, gemma, told) -> Choice:
    return choose(llama, gemma, Short(), RECIPE, on_candidate=told.append)


def test_every_map_is_tried_on_either_grid(choice, told):
    tried = [(one.grid, one.spec) for one in choice.candidates]
    assert tried == [
        ("sender", SMALL),
        ("sender", LARGE),
        ("receiver", SMALL),
        ("receiver", LARGE),
        ("receiver", "classwise"),
    ]
    assert told == choice.candidates
    for one in choice.candidates:
        assert one.aligner.contract.grid == one.grid and not one.trained
        assert one.mb == megabytes(one.aligner) > 0


def test_the_one_after_which_the_receiver_goes_on_best_is_kept(choice):
    assert choice.best.dev_loss == min(one.dev_loss for one in choice.candidates)
    assert choice.material.route.grid == choice.best.grid
    assert len(choice.scores) == len(RECIPE.codecs) + 1 and choice.scores[-1].name == "token table"
    assert {score.nats.shape for score in choice.scores} == {(32,)}


def test_what_attention_reads_decides_among_equals(choice):
    one, two = choice.candidates[:2]
    near, far = (
        replace(one, dev_loss=1.0, fidelity=replace(one.fidelity, attention_error=error))
        for error in (0.1, 0.2)
    )
    assert near.rank < far.rank < replace(near, dev_loss=1.1).rank
    assert one.rank != two.rank


def test_a_sender_that_understood_something_is_worth_it(choice):
    """Same item, same codec: the map's nats against those of the table."""
    better = choice.scores[-1].nats - choice.scores[0].nats
    assert choice.over_table.difference == pytest.approx(better.mean())
    assert choice.worth_it and choice.over_table.ci95[0] > 0
    report = report_choice(choice, ("llama", "gemma3"), "kvferry fit ...", 1.0)
    assert report.verdict.startswith("worth it: ")
    assert report.verdict in report.card and choice.best.spec in report.card
    assert [one.name for one in report.scores] == [one.name for one in choice.scores[:-1]]


def test_questions_about_another_text_are_not_worth_it(llama, gemma, monkeypatch):
    """The sender's cache then says nothing of what is asked: no map does better than the table."""
    monkeypatch.setattr(auto, "CLOSED", (LARGE,))
    monkeypatch.setattr(auto, "ON_RECEIVER_GRID", ())
    choice = choose(llama, gemma, Short(apart=True), RECIPE)
    assert not choice.worth_it
    report = report_choice(choice, ("llama", "gemma3"), "kvferry fit ...", 1.0)
    assert report.verdict.startswith("not worth it: ")


def test_a_cap_on_the_size_is_kept(llama, qwen):
    """With one tokenizer there is one grid."""
    sizes = {spec: 4e-6 * n for spec, n in ((SMALL, 32 * (384 + 512) + 512), (LARGE, 385 * 512))}
    choice = choose(llama, qwen, Short(), RECIPE, max_mb=sizes[SMALL] + 1e-9)
    small, large = choice.candidates
    assert {one.spec: one.mb for one in (small, large)} == pytest.approx(sizes)
    assert choice.best is small
    assert large.rank < small.rank, "or the cap decided nothing"


def test_a_cap_that_no_map_keeps_is_refused_with_one_that_would_do(llama, qwen, monkeypatch):
    monkeypatch.setattr(auto, "CLOSED", ("procrustes",))
    with pytest.raises(UsageError, match=r"no map is as small as 0\.001 MB") as refusal:
        choose(llama, qwen, Short(), RECIPE, max_mb=0.001, on_candidate=lambda one: pytest.fail(one.spec))
    size = 4e-6 * (4 * (2 * 48 * 64) + 512)
    allowed = float(refusal.value.cure.split()[1])
    assert size <= allowed < size + 0.01


def test_the_last_of_a_grid_is_trained(llama, qwen, monkeypatch):
    monkeypatch.setattr(auto, "CLOSED", ("procrustes",))
    choice = choose(llama, qwen, Short(), replace(RECIPE, loop=LoopRecipe(steps=2, warmup=1)))
    assert [(one.grid, one.spec, one.trained) for one in choice.candidates] == [
        ("sender", "procrustes", False),
        ("sender", PERCEPTRON, True),
    ]
    trained, start = choice.candidates[-1], closed_form(choice.material, PERCEPTRON)[0]
    assert trained.aligner.options()["folded"] and not start.options()["folded"]


# The command


def run(*words: str):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["fit", *words])


def test_the_command_keeps_the_best_and_says_what_it_is_worth(tmp_path):
    out = tmp_path / "out"
    sizes = ("--texts", "24", "--steps", "0", "--codecs", "raw(float16)", "--receiver", "qwen3")
    done = run("--auto", "--max-mb", "0.5", *sizes, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert "worth it: " in said["verdict"]
    assert megabytes(load_aligner(out)) <= 0.5
    assert done.stderr.count("nats per token on dev") == 2
    card = (out / "README.md").read_text()
    assert said["verdict"] in card
    (command,) = (line for line in card.splitlines() if line.startswith("Made by"))
    words = shlex.split(command.removeprefix("Made by `").removesuffix("`."))
    assert "--auto" in words and words[words.index("--max-mb") + 1] == "0.5"
    assert "--aligner" not in words and "--grid" not in words


@pytest.mark.parametrize(
    "words",
    [("--aligner", "linear"), ("--grid", "receiver"), ("--checkpoints", "a"), ("--journal", "a.jsonl")],
    ids=lambda words: words[0],
)
def test_what_it_chooses_itself_cannot_be_given(words, tmp_path):
    done = run("--auto", *words, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and f"{words[0]} with --auto" in done.output
