"""Sources of examples, models that share no text, and captures kept on disk."""

import json
import random
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import architectures
from kvferry.errors import FolderError, MissingExtra, UsageError
from kvferry.kv import KV
from kvferry.models.capture import Captured, capture
from kvferry.models.load import Model, load, wrap
from kvferry.models.prompt import PLAIN
from kvferry.train.examples import (
    Batches,
    DataSet,
    Places,
    QuestionFile,
    TextFile,
    TextLines,
    Worlds,
    described,
    source_of,
)
from kvferry.train.fit import fit
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.pair_cache import PairCache
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.sources.example import PASSAGE_CHARS, passage

STORY = "Ann has tea in Oslo and {} cups of it in Bath, which is far away."


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def contexts(source, split, n=60):
    return {example.context for example in islice(source.examples(split, 0), n)}


# Examples


@given(st.text(alphabet="ab é北🙂", min_size=0, max_size=60), st.integers(40, 2000), st.randoms())
def test_a_passage_is_a_stretch_of_its_text(extra, length, rng):
    text = " ".join((("word é北京 " + extra) * length)[:length].split()).ljust(40, "x")
    example = passage(text, rng)
    (first, is_first_scored), (rest, is_rest_scored) = example.pieces
    assert (is_first_scored, is_rest_scored) == (False, True)
    assert example.context and first and rest
    assert example.context + first + rest in text


def test_a_long_text_gives_passages_of_one_size():
    text = " ".join(f"word{i}" for i in range(1000))
    sizes = {len(passage(text, random.Random(seed)).context) for seed in range(20)}
    assert all(PASSAGE_CHARS - 10 <= size <= PASSAGE_CHARS + 10 for size in sizes)


@pytest.mark.parametrize("start", [0, 1, 7])
def test_batches_may_begin_anywhere(start):
    """What a killed training goes on with."""
    batches = Batches(Worlds(), "train", seed=2, size=3)
    assert next(batches(start)) == list(islice(batches(0), start + 1))[-1]
    assert len(next(batches(start))) == 3


def test_the_kind_of_source_follows_the_name(tmp_path):
    questions = lines(tmp_path / "q.jsonl", [{"context": "c", "question": "q", "answer": "a"}])
    texts = lines(tmp_path / "t.jsonl", [{"text": STORY}])
    assert source_of(None, PLAIN) == source_of("worlds", PLAIN) == Worlds()
    assert source_of(Path("places"), PLAIN) == Places()
    assert source_of(questions, PLAIN) == QuestionFile(questions, PLAIN)
    assert source_of(texts, PLAIN) == TextLines(texts)
    assert source_of(tmp_path / "a.txt", PLAIN) == TextFile(tmp_path / "a.txt")
    assert source_of(tmp_path, PLAIN) == DataSet(str(tmp_path), None, PLAIN)
    assert source_of("datasets:org/name", PLAIN) == DataSet("org/name", None, PLAIN)
    assert source_of(tmp_path / "a.parquet", PLAIN) == DataSet(str(tmp_path / "a.parquet"), None, PLAIN)


# Rows


def test_json_lines_of_texts_are_read_as_passages(tmp_path):
    source = source_of(lines(tmp_path / "t.jsonl", [{"text": STORY.format(i)} for i in range(30)]), PLAIN)
    for split, numbers in (("dev", {9, 19, 29}), ("test", {8, 18, 28})):
        found = contexts(source, split)
        assert found == {context for i in numbers for context in found if STORY.format(i).startswith(context)}
        assert len(found) == 3
    example = next(source.examples("train", 0))
    assert example.context + "".join(text for text, _ in example.pieces) in {
        STORY.format(i) for i in range(30)
    }


def test_empty_rows_are_skipped_and_counted(tmp_path):
    rows = [{"text": STORY.format(i)} for i in range(10)]
    rows[3:3] = [{"text": ""}, {"text": "  \n "}, {"text": None}, {"text": "too short"}]
    source = source_of(lines(tmp_path / "t.jsonl", rows), PLAIN)
    assert described(source) == "t.jsonl (4 of 14 rows skipped: empty or too short)"
    assert all(contexts(source, "train"))
    questions = [{"context": f"c{i}", "question": "q", "answer": "a"} for i in range(10)]
    questions += [
        {"context": " ", "question": "q", "answer": "a"},
        {"context": "c", "question": "q", "answer": ""},
    ]
    source = source_of(lines(tmp_path / "q.jsonl", questions), PLAIN)
    assert described(source) == "q.jsonl (2 of 12 rows skipped: empty or too short)"
    assert contexts(source, "train") == {f"c{i}" for i in range(8)}
    assert described(Worlds()) == "worlds"


def test_nothing_left_is_an_error(tmp_path):
    source = source_of(lines(tmp_path / "t.jsonl", [{"text": ""}] * 20), PLAIN)
    with pytest.raises(UsageError, match=r"no row for train: 0 of 20 can be used.*at least ten rows"):
        next(source.examples("train", 0))
    source = source_of(lines(tmp_path / "t.jsonl", [{"text": STORY.format(i)} for i in range(8)]), PLAIN)
    with pytest.raises(UsageError, match="no row for dev: 8 of 8"):
        next(source.examples("dev", 0))


def test_a_context_is_in_one_split_only(tmp_path):
    """Of many questions about one text, some would else be tested on what was trained on."""
    rows = [{"context": f"c{i // 7}", "question": f"q{i}", "answer": "a"} for i in range(140)]
    source = QuestionFile(lines(tmp_path / "q.jsonl", rows), PLAIN)
    assert contexts(source, "dev", 200) == {"c9", "c19"}
    assert contexts(source, "test", 200) == {"c8", "c18"}
    assert len(contexts(source, "train", 500)) == 16


WRONG_LINES = {
    "no JSON": ('{"text": "a"}\n{"text', "line 2 of .* is no JSON"),
    "a list": ("[1]", "line 1 of .* is list, no object"),
    "no text": ('{"text": "a"}\n{"txt": "a"}', "line 2 of .* has no text"),
    "no answer": ('\n{"context": "a", "question": "b"}', "line 2 of .* has no answer"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_LINES.values(), ids=list(WRONG_LINES))
def test_a_line_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        next(source_of(path, PLAIN).examples("train", 0))


# Data sets


@pytest.fixture(scope="module")
def stories():
    texts = [STORY.format(i) for i in range(20)]
    return datasets.Dataset.from_dict({"text": [*texts, ""], "other": [*map(str.upper, texts), None]})


def saved(form, stories, folder):
    if form == "parquet":
        stories.to_parquet(str(folder / "a.parquet"))
        return str(folder / "a.parquet")
    if form == "folder of parquet":
        stories.to_parquet(str(folder / "train-0.parquet"))
        return str(folder)
    rows = datasets.DatasetDict(train=stories) if form == "splits" else stories
    rows.save_to_disk(str(folder / "saved"))
    return str(folder / "saved") if form != "arrow" else str(next((folder / "saved").glob("*.arrow")))


@pytest.mark.parametrize("form", ["parquet", "folder of parquet", "saved", "splits", "arrow"])
def test_data_sets_on_this_disk_are_read(tmp_path, stories, form, capsys):
    where = saved(form, stories, tmp_path)
    source = source_of(where, PLAIN)
    assert contexts(source, "dev") == contexts(source_of(f"datasets:{where}", PLAIN), "dev")
    assert len(contexts(source, "dev")) == 2
    assert described(source).endswith("(1 of 21 rows skipped: empty or too short)")
    upper = source_of(f"datasets:{where}:other", PLAIN)
    assert {text.upper() for text in contexts(source, "dev")} == contexts(upper, "dev")


def test_a_data_set_of_questions_is_asked(tmp_path):
    rows = {"context": [f"c{i}" for i in range(20)], "question": ["q"] * 20, "answer": ["a"] * 20}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "q.parquet"))
    example = next(source_of(tmp_path / "q.parquet", PLAIN).examples("dev", 0))
    assert example.pieces == ((PLAIN.question("q"), False), (" a", True))


def test_a_data_set_that_cannot_be_used_is_refused(tmp_path, stories, monkeypatch):
    stories.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UsageError, match=r"no column 'txt', but other, text\. Name one"):
        next(source_of(f"datasets:{tmp_path / 'a.parquet'}:txt", PLAIN).examples("train", 0))
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    for where in (tmp_path / "b.parquet", tmp_path / "nowhere.arrow", tmp_path / "nowhere.parquet"):
        with pytest.raises(UsageError, match="cannot read the data set"):
            next(source_of(where, PLAIN).examples("train", 0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"kvferry\[data\]"):
        next(source_of(tmp_path / "a.parquet", PLAIN).examples("train", 0))


# Tokenizers that do not fit


def reader_of(alphabet: str) -> Model:
    """A random model whose tokenizer knows these characters and drops all others."""
    tokenizer = Tokenizer(BPE({"<s>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}, []))
    # BPE drops them as well, but then the offsets of what follows are off.
    tokenizer.normalizer = normalizers.Replace(Regex(f"[^{alphabet}]"), "")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return wrap(architectures.build("llama"), fast, name=alphabet)


def test_models_with_no_common_text_are_refused(tmp_path):
    """Each reads half of every text, and none of what the other one reads."""
    source = TextLines(lines(tmp_path / "t.jsonl", [{"text": f"abcABC {i} " * 12} for i in range(20)]))
    recipe = FitRecipe("linear", ("raw",), data=DataRecipe(texts=4), loop=LoopRecipe(steps=0))
    with pytest.raises(UsageError, match=r"no token pairs.*texts that both tokenizers can read"):
        fit(reader_of("abc"), reader_of("ABC"), source, recipe)


# Captures on disk


@pytest.fixture(scope="module")
def models():
    return load("llama"), load("gemma3")


TEXTS = ["Ann has tea in Oslo.", "Ben has a red cup, and it is in Bath."]


def assert_same(one: Captured, other: Captured) -> None:
    assert numbers(one.kv).keys() == numbers(other.kv).keys()
    for name, tensor in numbers(one.kv).items():
        assert torch.equal(tensor, numbers(other.kv)[name]), name
    assert (one.kv.geometry, one.kv.space, one.kv.call_length) == (
        other.kv.geometry,
        other.kv.space,
        other.kv.call_length,
    )
    for mine, theirs in zip(vars(one.evidence).values(), vars(other.evidence).values(), strict=True):
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def numbers(kv: KV) -> dict[str, torch.Tensor]:
    spans = {
        f"{name}{row}": torch.from_numpy(column)
        for row, spans in enumerate(kv.spans)
        for name, column in vars(spans).items()
        if column is not None
    }
    groups = {f"{i}": tensor for i, tensor in enumerate(t for g in kv.groups for t in (g.keys, g.values))}
    return {"present": kv.present, "positions": kv.positions, **spans, **groups}


class Readings:
    """Counts how often a model reads."""

    def __init__(self, model: Model) -> None:
        self.n = 0
        self._handle = model.hf.get_decoder().register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.n += 1

    def __enter__(self) -> "Readings":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_what_was_captured_is_read_from_disk(tmp_path, models):
    needs = ("queries_content", "hidden_states")
    fresh = capture(models[0], TEXTS), capture(models[1], TEXTS, needs)
    with Readings(models[0]) as readings:
        first = PairCache(tmp_path, *models, max_bytes=10**8, needs=needs).read(TEXTS)
        assert readings.n == 1
        again = PairCache(tmp_path, *models, max_bytes=10**8, needs=needs).read(TEXTS)
        assert readings.n == 1
    for side in range(2):
        assert_same(first[side], fresh[side])
        assert_same(again[side], fresh[side])
    assert again[1].evidence.hidden_states and not again[0].evidence.hidden_states


def test_a_cache_belongs_to_models_texts_and_needs(tmp_path, models):
    llama, gemma = models
    caches = [
        PairCache(tmp_path, llama, gemma, 0),
        PairCache(tmp_path, gemma, llama, 0),
        PairCache(tmp_path, llama, load("qwen3"), 0),
        PairCache(tmp_path, llama, gemma, 0, needs=("hidden_states",)),
    ]
    paths = {cache.path(texts) for cache in caches for texts in (TEXTS, TEXTS[:1], TEXTS[::-1])}
    assert len(paths) == 12
    assert PairCache(tmp_path, *models, 10**8).path(TEXTS) in paths


def test_the_folder_stops_growing_at_its_limit(tmp_path, models):
    """What is there stays, and what does not fit is captured each time, with the same result."""
    roomy = PairCache(tmp_path / "roomy", *models, max_bytes=10**9)
    roomy.read(TEXTS[:1])
    n_bytes = roomy.n_bytes
    exact = PairCache(tmp_path / "exact", *models, max_bytes=n_bytes)
    exact.read(TEXTS[:1])
    assert exact.n_bytes == n_bytes == exact.path(TEXTS[:1]).stat().st_size
    assert_same(exact.read(TEXTS[1:])[1], capture(models[1], TEXTS[1:]))
    assert exact.n_bytes == n_bytes
    with Readings(models[0]) as readings:
        exact.read(TEXTS[:1])
        exact.read(TEXTS[1:])
    assert readings.n == 1
    tight = PairCache(tmp_path / "tight", *models, max_bytes=n_bytes - 1)
    tight.read(TEXTS[:1])
    assert tight.n_bytes == 0


def test_a_damaged_file_is_refused_and_captured_again(tmp_path, models):
    cache = PairCache(tmp_path, *models, max_bytes=10**9)
    cache.read(TEXTS)
    path = cache.path(TEXTS)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(FolderError, match=rf"Delete {path.name}; it is then captured again"):
            cache.read(TEXTS)
    path.unlink()
    assert_same(cache.read(TEXTS)[0], capture(models[0], TEXTS))
    assert len(path.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, models):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="Free space there"):
        PairCache(tmp_path / "file" / "folder", *models, max_bytes=10**9).read(TEXTS)
