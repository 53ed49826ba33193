"""The models that ship with the package: loadable, small, exact in their offsets, and able to read."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvferry.errors import UnknownName
from kvferry.models.zoo import catalog
from kvferry.models.zoo.batches import batches
from kvferry.models.zoo.draw import MAX_FACTS
from kvferry.models.zoo.evaluate import Task, accuracy, greedy_answers, items
from kvferry.models.zoo.kinds import KINDS
from kvferry.models.zoo.recipes import RECIPES, Recipe, Stage
from kvferry.models.zoo.tokenizers import MAX_POSITIONS, TOKENIZERS
from kvferry.models.zoo.train import train_zoo
from kvferry.models.zoo.worlds import continuation, make_document, make_item

NAMES = catalog.names()
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@cache
def member(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return catalog.load(name)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_every_folder_is_complete_and_small(name):
    folder = catalog.zoo_path(name)
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "model.safetensors").stat().st_size <= 2_000_000


def test_recipes_catalogue_and_folders_name_the_same_models():
    assert set(NAMES) <= set(RECIPES)
    assert {path.name for path in catalog.zoo_path("llama").parent.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_member_loads_as_its_recipe_says(name):
    model, _ = member(name)
    recipe = RECIPES[name]
    assert model.config.model_type == recipe.architecture
    assert model.config.max_position_embeddings == MAX_POSITIONS
    assert model.dtype == torch.float32
    for key in ("num_hidden_layers", "num_key_value_heads", "hidden_size"):
        assert getattr(model.config, key) == recipe.shape[key]


@pytest.mark.parametrize("name", NAMES)
def test_every_member_reads_eight_facts(name):
    model, tokenizer = member(name)
    questions = items(Task("", "place", 8), tokenizer, 32) + items(Task("", "met", 8), tokenizer, 32)
    assert accuracy(model, tokenizer, questions) >= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_without_the_context_a_member_guesses(name):
    model, tokenizer = member(name)
    asked = items(Task("", "place", 8), tokenizer, 64)
    blind = [f"Q: {item.question}\nA:" for item in asked]
    hits = [a == item.answer for a, item in zip(greedy_answers(model, tokenizer, blind), asked, strict=True)]
    assert sum(hits) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_only_a_bos_is_added(name):
    _, tokenizer = member(name)
    assert tokenizer("Ann").input_ids == [tokenizer.bos_token_id, *ids(tokenizer, "Ann")]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 10**6), st.sampled_from(sorted(KINDS)))
@settings(max_examples=15)
def test_offsets_tile_the_text_and_pieces_do_not_depend_on_where_it_is_cut(name, seed, kind):
    _, tokenizer = member(name)
    document = make_document(seed, kind=kind, n_fillers=6)
    coded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [0, *(end for _, end in coded.offset_mapping)]
    assert [start for start, _ in coded.offset_mapping] == ends[:-1]
    assert ends[-1] == len(document.text)
    assert coded.input_ids == [i for piece, _ in document.pieces() for i in ids(tokenizer, piece)]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_has_the_same_pieces_in_the_context_and_behind_the_prompt(name):
    _, tokenizer = member(name)
    for seed in range(100):
        item = make_item(seed)
        answer = ids(tokenizer, f" {item.answer}")
        joint = ids(tokenizer, item.prompt + continuation(item.answer))
        assert joint == ids(tokenizer, item.prompt) + answer + ids(tokenizer, "\n")
        if f" {item.answer}" in item.context:
            assert ",".join(map(str, answer)) in ",".join(map(str, ids(tokenizer, item.context)))


@pytest.mark.parametrize("name", NAMES)
@given(st.text(max_size=40))
@settings(max_examples=50)
def test_any_text_can_be_read(name, text):
    _, tokenizer = member(name)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = {at for start, end in coded.offset_mapping for at in range(start, end)}
    assert covered == set(range(len(text)))
    if "▁" not in text and not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(coded.input_ids) == text


def test_llama_and_qwen3_share_their_tokenizer_to_the_byte():
    one, two = (catalog.zoo_path(name) / "tokenizer.json" for name in ("llama", "qwen3"))
    assert one.read_bytes() == two.read_bytes()


def test_the_tokenizers_segment_differently():
    text = make_document(0, n_fillers=4).text
    one, two = (
        set(member(name)[1](text, return_offsets_mapping=True).offset_mapping) for name in ("llama", "gemma3")
    )
    assert len(one & two) < 0.7 * len(one)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_that_ships_is_the_one_its_recipe_makes(name):
    shipped = json.loads((catalog.zoo_path(name) / "tokenizer.json").read_text(encoding="utf-8"))
    made = json.loads(TOKENIZERS[RECIPES[name].tokenizer]().to_str())
    assert shipped["model"] == made["model"]


@pytest.mark.parametrize("name", NAMES)
def test_32_facts_fit_768_tokens(name):
    _, tokenizer = member(name)
    assert max(len(tokenizer(make_item(s, n_facts=MAX_FACTS).prompt).input_ids) for s in range(50)) <= 768


def test_a_batch_marks_answers_and_padding():
    tokenizer = TOKENIZERS["bytes"]()
    stage = Stage(1, facts=(1, 3), batch_tokens=2000)
    batch = next(batches(stage, tokenizer, seed=0))
    for row, learned, real in zip(batch.ids, batch.learned, batch.real, strict=True):
        text = tokenizer.decode(row[real].tolist())
        assert not (learned & ~real).any()
        questions = [line for line in text.splitlines() if line.startswith("A: ")]
        assert tokenizer.decode(row[learned].tolist()).splitlines() == [line[2:] for line in questions]


def test_an_unknown_member_is_named_with_its_neighbour():
    with pytest.raises(UnknownName, match="Did you mean 'llama'"):
        catalog.zoo_path("lama")


def test_training_writes_a_folder_that_loads(tmp_path, monkeypatch):
    shape = {**RECIPES["llama"].shape, "num_hidden_layers": 1}
    tiny = Recipe("llama", shape, "bytes", (Stage(2, copies=1.0), Stage(2, facts=(1, 2))))
    monkeypatch.setitem(RECIPES, "llama", tiny)
    trained = train_zoo("llama", tmp_path, progress=False, n_scored=1)
    assert {path.name for path in trained.path.iterdir()} == FILES
    model, _ = catalog.load_folder(trained.path)
    assert model.config.num_hidden_layers == 1
    assert all(f"| {task} |" in (trained.path / "README.md").read_text() for task in trained.scores)
