"""Fingerprints: equal for what is interchangeable, different for everything else."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from architectures import ARCHITECTURES, build, from_config
from kvferry.errors import ModelRefused
from kvferry.models.fingerprint import _offsets, tokenizer_fingerprint
from kvferry.models.geometry import read_geometry


def fingerprint(model: PreTrainedModel) -> str:
    return read_geometry(model, "").model


def test_form() -> None:
    assert len(fingerprint(build("llama"))) == 64
    assert int(fingerprint(build("llama")), 16) > 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "phi3-longrope", "gpt_oss"])
def test_precision_and_the_way_to_disk_and_back_do_not_count(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in ("float32", "bfloat16"))
    half.save_pretrained(tmp_path / "half")
    widened = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {fingerprint(loaded) for loaded in (whole, half, widened)} == {fingerprint(model)}


def _one_weight(model: PreTrainedModel) -> None:
    model.model.layers[3].mlp.down_proj.weight.data[5, 7] += 0.1


def _low_rank(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data += 0.05 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))


def _quantised(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter((layer.weight * 10).to(torch.int8), requires_grad=False)
    layer.forward = lambda hidden: hidden @ layer.weight.float().T / 10  # type: ignore[method-assign]


def _swapped(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp, model.model.layers[1].mlp = (
        model.model.layers[1].mlp,
        model.model.layers[0].mlp,
    )


@pytest.mark.parametrize("change", [_one_weight, _low_rank, _quantised, _swapped])
def test_other_weights_differ_at_an_equal_shape(change: Callable[[PreTrainedModel], None]) -> None:
    model = copy.deepcopy(build("llama"))
    change(model)
    before, after = read_geometry(build("llama"), ""), read_geometry(model, "")
    assert before.model != after.model
    assert before.shape_digest() == after.shape_digest()


def test_architectures_differ_even_at_equal_weights() -> None:
    assert len({fingerprint(build(name)) for name in ARCHITECTURES}) == len(ARCHITECTURES)


def test_tied_weights_count_once_however_they_are_stored() -> None:
    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    tied = from_config(config)
    stored_twice = copy.deepcopy(tied)
    stored_twice.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert fingerprint(tied) == fingerprint(stored_twice)
    with torch.no_grad():
        stored_twice.lm_head.weight[0, 0] += 1.0
    assert fingerprint(tied) != fingerprint(stored_twice)


def test_samples_reach_every_part_of_a_matrix() -> None:
    offsets = _offsets(4096 * 4096)
    assert len(offsets) == 2048
    assert (int(offsets[0]), int(offsets[-1])) == (0, 4096 * 4096 - 1)
    assert len(torch.unique(offsets % 4096)) > 1000
    assert len(torch.unique(_offsets(2049))) > 2000


def test_weights_must_be_in_memory() -> None:
    model = copy.deepcopy(build("llama"))
    model.lm_head.to("meta")
    with pytest.raises(ModelRefused, match=r"lm_head\.weight is not in memory"):
        fingerprint(model)


def tokenizer(*words: str) -> FastTokenizer:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "</s>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return FastTokenizer(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def test_use_does_not_change_a_tokenizer(tmp_path: Path) -> None:
    used = tokenizer("a", "b")
    before = tokenizer_fingerprint(used)
    used.pad_token = used.eos_token
    used(["a b", "a"], padding="max_length", truncation=True, max_length=7, return_tensors="pt")
    assert tokenizer_fingerprint(used) == before
    used.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_vocabulary_and_special_tokens_count() -> None:
    other_roles, added = tokenizer("a", "b"), tokenizer("a", "b")
    other_roles.eos_token = "a"
    added.add_tokens(["c"])
    prints = [
        tokenizer_fingerprint(t) for t in (tokenizer("a", "b"), tokenizer("b", "a"), other_roles, added)
    ]
    assert len(set(prints)) == len(prints)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelRefused, match=r"ByT5Tokenizer gives no offsets.*tokenizer\.json"):
        tokenizer_fingerprint(ByT5Tokenizer())


def test_real_tokenizers_survive_saving(shared_dir: Path, tmp_path: Path) -> None:
    for folder in sorted((shared_dir / "models").iterdir()):
        loaded = AutoTokenizer.from_pretrained(folder)
        loaded.save_pretrained(tmp_path / folder.name)
        again = AutoTokenizer.from_pretrained(tmp_path / folder.name)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(again)
