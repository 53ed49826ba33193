"""Recipes: what is shipped loads, and whatever is wrong in one is named with its line."""

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.align.table import ALIGNERS
from kvferry.errors import BadSpec, KvferryError, UnknownName, UsageError
from kvferry.models.prompt import PLAIN
from kvferry.train.examples import DataSet, source_of
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe, aligner_call, load_recipe
from source import ROOT

HEAD = "aligner: linear(neighbours=2)\ncodecs:\n  - raw\n  - int(bits=8, group=32)\n"


def read(folder: Path, text: str) -> FitRecipe:
    path = folder / "fit.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert len(recipe.parsed()) == len(recipe.codecs)
    assert aligner_call(recipe.aligner)[0] in ALIGNERS
    assert recipe.data.source in ("worlds", "places", "stories")


def test_every_shipped_recipe_is_named_in_the_docs():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "docs" / "recipes").glob("*.yaml")}
    assert names == {name for name in names if f"docs/recipes/{name}" in page} != set()


def test_what_is_left_out_has_a_default(tmp_path):
    recipe = read(tmp_path, HEAD)
    assert recipe == FitRecipe("linear(neighbours=2)", ("raw", "int(bits=8, group=32)"))
    assert recipe.loop == LoopRecipe()
    assert (recipe.grid, recipe.losses) == ("sender", {"answer": 1.0})
    assert read(tmp_path, f"{HEAD}grid: receiver").grid == "receiver"


def test_every_setting_of_the_loop_can_be_said(tmp_path):
    lines = """
    steps: 10
    learning_rate: 7e-4
    shares: {inner: 0.5, outer: 0}
    warmup: 2
    weight_decay: 1.0e-2
    clip: .inf
    accumulate: 4
    precision: bf16
    evaluate_every: 5
    patience: 3
    average: .99
    checkpoint_every: 5
    seed: 7
    """
    recipe = read(tmp_path, f"{HEAD}loop:{lines}")
    assert recipe.loop == LoopRecipe(
        10, 7e-4, {"inner": 0.5, "outer": 0.0}, 2, 0.01, math.inf, 4, "bf16", 5, 3, 0.99, 5, 7
    )


def test_a_recipe_names_its_data(tmp_path):
    recipe = read(tmp_path, f"{HEAD}data:\n  source: datasets:org/name:story")
    assert source_of(recipe.data.source, PLAIN) == DataSet("org/name", "story", PLAIN)


WRONG = {
    "unknown key": ("lop: {}", UnknownName, r"key in line 5 of .*'lop'\. Did you mean 'loop'"),
    "unknown key below": (
        "loop:\n  stepz: 3",
        UnknownName,
        r"key in line 6 of .*'stepz'\. Did you mean 'steps'",
    ),
    "unknown key of data": ("data:\n  sourc: a", UnknownName, r"line 6 .*Did you mean 'source'"),
    "a key twice": ("loop:\n  steps: 1\n  steps: 2", BadSpec, r"'steps' stands a second time in line 7"),
    "a free key twice": (
        "losses: {answer: 1, answer: 2}",
        BadSpec,
        "'answer' stands a second time in line 5",
    ),
    "text for a number": ("loop:\n  steps: '3'", BadSpec, r"loop\.steps in line 6 of .*: '3' is not valid"),
    "truth for a number": ("loop:\n  steps: true", BadSpec, r"loop\.steps in line 6"),
    "fraction for a count": ("loop:\n  steps: 1e3", BadSpec, r"loop\.steps in line 6"),
    "octal": ("loop:\n  steps: 010", BadSpec, r"loop\.steps in line 6"),
    "number for a text": ("data:\n  source: 3", BadSpec, r"data\.source in line 6"),
    "number for a section": ("loop: 3", BadSpec, "loop in line 5"),
    "nothing for a section": ("loop:", BadSpec, "loop in line 5"),
    "a precision that does not exist": (
        "loop:\n  precision: fp16",
        BadSpec,
        r"loop\.precision .*'fp32' or 'bf16'",
    ),
    "out of range": (
        "loop:\n  warmup: 5\n  steps: -3",
        UsageError,
        r"line 7 of .*: steps is -3, out of range",
    ),
    "a grid that does not exist": ("grid: sendr", BadSpec, r"grid in line 5 of .*'sender' or 'receiver'"),
    "no texts": ("data:\n  texts: 0", UsageError, r"line 6 of .*: texts is 0, .*at least 1"),
    "a loss that counts nothing": ("losses:\n  answer: 0", UsageError, r"losses\.answer in line 6"),
    "a loss that does not exist": (
        "losses:\n  anser: 1",
        UnknownName,
        r"line 6 of .*'anser'\. Did you mean 'answer'",
    ),
    "no loss": ("losses: {}", UsageError, "losses is empty"),
    "half a list": ("losses: [a", BadSpec, "line 5 of .* is no YAML"),
    "code": ("data: !!python/object/apply:os.system [ls]", BadSpec, "line 5 of .* is no YAML"),
}


@pytest.mark.parametrize(("tail", "error", "message"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_named_with_its_line(tmp_path, tail, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, HEAD + tail)


HEADS = {
    "empty": ("", BadSpec, "holds no keys"),
    "a list": ("- raw", BadSpec, "holds no keys"),
    "two documents": (f"{HEAD}---\n{HEAD}", BadSpec, "is no YAML"),
    "no codecs": ("aligner: linear", BadSpec, "codecs .*is missing"),
    "one codec without a list": ("aligner: linear\ncodecs: raw", BadSpec, "codecs in line 2"),
    "an empty list": ("aligner: linear\ncodecs: []", UsageError, "line 2 .*codecs is empty"),
    "unknown codec": (
        "aligner: linear\ncodecs:\n  - raw\n  - ray",
        UnknownName,
        r"line 4 .*Did you mean 'raw'",
    ),
    "unknown aligner": ("codecs: [raw]\naligner: lineer", UnknownName, "line 2 .*Did you mean 'linear'"),
    "unknown option": (
        "codecs: [raw]\naligner: linear(neighbour=1)",
        UnknownName,
        "Did you mean 'neighbours'",
    ),
    "too many options": ("codecs: [raw]\naligner: identity(1)", BadSpec, "too many values"),
    "text for a number in a spec": (
        "codecs: [raw]\naligner: residual_mlp(hidden=a)",
        BadSpec,
        "line 2 .*residual_mlp: hidden='a' is not valid",
    ),
    "no spec": ("codecs: [raw]\naligner: 'linear('", BadSpec, "cannot read the spec"),
    "a comma in a spec": ("aligner: linear\ncodecs: [int(bits=8, group=32)]", BadSpec, r"'int\(bits=8'"),
}


@pytest.mark.parametrize(("text", "error", "message"), HEADS.values(), ids=list(HEADS))
def test_a_recipe_without_its_head_is_refused(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, text)


MADE = [
    {"codecs": ("ray",)},
    {"codecs": ()},
    {"aligner": "lineer"},
    {"losses": {"anser": 1.0}},
    {"losses": {"answer": -1.0}},
]


@pytest.mark.parametrize("wrong", MADE, ids=str)
def test_recipes_made_by_hand_are_looked_at_too(wrong):
    with pytest.raises(UsageError):
        FitRecipe(**{"aligner": "linear", "codecs": ("raw",), **wrong})
    with pytest.raises(UsageError, match="texts is 0"):
        DataRecipe(texts=0)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "spec",
    [
        "linear('2')",
        "linear(neighbours=2.0)",
        "linear(neighbours=True)",
        "residual_mlp(classes=1)",
        "blockwise(sources=1)",
        "blockwise(sources=[['a']])",
        "blockwise(reads=neither)",
        "kv_projector(targets=terminal)",
    ],
)
def test_an_option_of_another_type_is_refused(spec):
    with pytest.raises(BadSpec, match="is not valid"):
        aligner_call(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "blockwise(sources='top_k_sources(k=2)', reads=same)",
        "procrustes(sources=[[0, 1], (1,)])",
        "elastic(mlp_ratio=1)",
        "narrow(seen=None)",
    ],
)
def test_an_option_of_the_right_type_is_taken(spec):
    assert aligner_call(spec)[1]


@given(st.text(alphabet="ab:-[]{}#&*!|>'\" \n\t,1.e~<", max_size=60))
def test_no_text_gets_past_the_typed_errors(tmp_path_factory, tail):
    folder = tmp_path_factory.mktemp("text")
    with contextlib.suppress(KvferryError):
        assert isinstance(read(folder, HEAD + tail), FitRecipe)
