"""Aligners: features, closed form, folders and contracts."""

import importlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvferry.align
from kvferry.align import ALIGNERS
from kvferry.align.contract import Aligner, Contract, from_json, to_json
from kvferry.align.covered import covers
from kvferry.align.features import flatten, look_back, unflatten, with_neighbours
from kvferry.align.folder import aligner_class, load_aligner, save_aligner
from kvferry.align.identity import Identity
from kvferry.align.linear import Linear
from kvferry.align.ridge import Sums, solve, standardise
from kvferry.align.zero_pad import ZeroPad
from kvferry.errors import CodecNotCovered, FolderError, ForeignModel, UnknownName, UsageError, WrongKeySpace
from kvferry.kv import KV
from kvferry.models.capture import capture, capture_rotated
from kvferry.train.whitened import Whitened
from tiny import model_of, random_rows, tokens_of


@pytest.fixture(scope="module")
def contract() -> Contract:
    sender, receiver = model_of("llama").geometry, model_of("qwen3").geometry
    return Contract(sender=sender, receiver=receiver, coded_with=("raw(dtype=float16, zstd=0)",))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope"])
def test_features_are_the_cache_and_back(name):
    kv = capture(model_of(name), tokens_of(random_rows(2, 5))).kv
    for got, want in zip(unflatten(flatten(kv), kv.geometry), kv.groups, strict=True):
        assert torch.equal(got.keys, want.keys.float()) and torch.equal(got.values, want.values.float())


def test_neighbours_are_the_tokens_before_and_nothing_where_there_is_none():
    kv = capture(model_of("llama"), tokens_of(random_rows(2, 5))).kv
    present = kv.present.clone()
    present[:, 1, 2] = False
    kv = replace(kv, present=present)
    wide, plain = with_neighbours(kv, 3), flatten(kv)
    width = plain.shape[-1]
    assert torch.equal(wide[0, 4], torch.cat([plain[0, 4], plain[0, 3], plain[0, 2]]))
    assert torch.equal(wide[0, 0, :width], plain[0, 0]) and wide[0, 0, width:].abs().max() == 0
    assert wide[1, 3, width : 2 * width].abs().max() == 0


def test_ridge_finds_an_affine_map_and_sums_add_in_any_order():
    x, weight, bias = torch.randn(400, 6), torch.randn(6, 3), torch.randn(3)
    y = x @ weight + bias
    parts = [Sums.of(x[i::4], y[i::4]) for i in range(4)]
    there, back = parts[0] + parts[1] + parts[2] + parts[3], parts[3] + parts[2] + parts[1] + parts[0]
    got, got_bias = solve(there, 1e-9)
    assert torch.allclose(got, weight, atol=1e-4) and torch.allclose(got_bias, bias, atol=1e-4)
    assert torch.allclose(got, solve(back, 1e-9)[0], atol=1e-6)


def test_ridge_with_a_large_penalty_predicts_the_mean():
    x, y = torch.randn(100, 4), torch.randn(100, 2) + 3
    weight, bias = solve(Sums.of(x, y), 1e9)
    assert weight.abs().max() < 1e-6 and torch.allclose(bias, y.mean(0), atol=1e-4)


def test_ridge_survives_constant_channels_and_refuses_too_few_pairs():
    x = torch.cat([torch.randn(50, 2), torch.ones(50, 1)], 1)
    assert solve(Sums.of(x, torch.randn(50, 2)), 1e-2)[0].isfinite().all()
    with pytest.raises(UsageError, match="1 token pairs"):
        standardise(Sums.of(x[:1], x[:1]))


def test_whitened_coordinates_start_at_the_same_map():
    x = torch.randn(300, 5) @ torch.randn(5, 5) * torch.tensor([1e-2, 1, 10, 1, 5]) + 3
    sums = Sums.of(x, torch.randn(300, 3))
    weight, bias = solve(sums, 1e-2)
    got, got_bias = Whitened(sums, weight, bias)()
    assert torch.allclose(x @ got + got_bias, x @ weight + bias, atol=1e-3)


def test_linear_maps_a_cache_into_the_receivers_geometry(contract):
    aligner = Linear(contract)
    torch.nn.init.normal_(aligner.weight)
    kv = capture(model_of("llama"), tokens_of(random_rows(2, 6))).kv
    present = kv.present.clone()
    present[1, 0, 2] = False
    mapped = aligner(replace(kv, present=present))
    assert mapped.geometry == contract.receiver
    assert not mapped.present[:, 0, 2].any() and mapped.present[:, 1].all()
    with pytest.raises(WrongKeySpace):
        aligner(capture_rotated(model_of("llama"), tokens_of(random_rows(1, 3))).kv)


def test_a_folder_loads_to_the_same_map(contract, tmp_path):
    aligner = Linear(contract, neighbours=2)
    torch.nn.init.normal_(aligner.weight)
    for _ in range(2):  # the second time over the first
        save_aligner(aligner, tmp_path / "a", card="# card\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = load_aligner(tmp_path / "a")
    assert again.contract == contract
    assert torch.equal(again.weight, aligner.weight) and again.options() == {"neighbours": 2}


def test_a_contract_survives_json(contract):
    assert from_json(json.loads(json.dumps(to_json(contract)))) == contract


@pytest.mark.parametrize(
    "harm", ["no config", "no weights", "cut weights", "other shape", "not json", "no name"]
)
def test_a_broken_folder_is_refused(contract, tmp_path, harm):
    folder = tmp_path / "a"
    save_aligner(Linear(contract), folder, card="")
    config, weights = folder / "config.json", folder / "model.safetensors"
    if harm == "no config":
        config.unlink()
    elif harm == "no weights":
        weights.unlink()
    elif harm == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "other shape":
        swapped = replace(contract, sender=contract.receiver, receiver=contract.sender)
        longer = replace(swapped, sender=replace(swapped.sender, layers=swapped.sender.layers * 2))
        config.write_text(json.dumps({"name": "linear", "contract": to_json(longer)}))
    elif harm == "not json":
        config.write_text("{")
    else:
        config.write_text("{}")
    with pytest.raises(FolderError, match="no aligner in"):
        load_aligner(folder)


def test_weights_that_are_no_numbers_are_refused(contract, tmp_path):
    broken = Linear(contract)
    broken.bias.data[0] = torch.nan
    save_aligner(broken, tmp_path / "a", card="")
    with pytest.raises(FolderError, match=r"bias in .* NaN or infinite\. Fit it anew"):
        load_aligner(tmp_path / "a")


def test_unknown_methods_and_folders_are_named(contract, tmp_path):
    save_aligner(Linear(contract), tmp_path / "a", card="")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "name": "os:system"}))
    with pytest.raises(UnknownName, match="os:system"):
        load_aligner(tmp_path / "a")
    with pytest.raises(FolderError, match="nowhere"):
        load_aligner(tmp_path / "nowhere")


def test_contracts_refuse_what_was_not_fitted(contract):
    contract.require_sender(contract.sender.model[:16], contract.sender.tokenizer[:16])
    with pytest.raises(ForeignModel, match="model"):
        contract.require_sender("f" * 16, contract.sender.tokenizer)
    with pytest.raises(ForeignModel, match="tokenizer"):
        contract.require_sender(contract.sender.model, "f" * 16)
    with pytest.raises(CodecNotCovered, match="int"):
        Linear(contract).require_codec("int(bits=4)")
    Identity(contract).require_codec("int(bits=4)")
    assert not covers(("int(bits=8, zstd=0)",), "raw(dtype=float32, zstd=0)")
    assert covers(("raw(dtype=float16, zstd=0)",), "raw(dtype=float32, zstd=3)")
    assert covers(("int(bits=8, zstd=0)",), "int(bits=8, zstd=3)")


def on_a_foreign_grid(kv: KV) -> KV:
    """Classes of overlap as a pooled cache has them."""
    classes = np.arange(kv.n_tokens, dtype=np.uint8)[::-1] % 8
    return replace(kv, spans=tuple(replace(row, overlap=classes.copy()) for row in kv.spans))


OPTIONS: dict[str, dict[str, Any]] = {"token_table": {"n_tokens": 5}}


def member(name: str, contract: Contract) -> Aligner:
    """One of the table, between the models of the contract that it allows."""
    if name == "identity":
        contract = replace(contract, receiver=contract.sender)
    aligner = aligner_class(name)(contract, **OPTIONS.get(name, {}))
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter)
    return aligner.eval()


@pytest.mark.parametrize("name", ALIGNERS)
def test_every_aligner_keeps_the_contract(name, contract, tmp_path):
    aligner = member(name, contract)
    rows = random_rows(2, 7)
    rows[1] = rows[1][:4]
    batch = on_a_foreign_grid(capture(model_of("llama"), tokens_of(rows)).kv)
    mapped = aligner(batch)
    assert mapped.geometry == aligner.contract.receiver and mapped.space == "content"
    assert mapped.spans == batch.spans and torch.equal(mapped.positions, batch.positions)
    for row, alone in enumerate(batch.sequences()):
        single = aligner(alone)
        for got, want in zip(list(mapped.sequences())[row].groups, single.groups, strict=True):
            assert torch.allclose(got.keys, want.keys, atol=1e-5)
            assert torch.allclose(got.values, want.values, atol=1e-5)
    save_aligner(aligner, tmp_path / name, card="")
    again = load_aligner(tmp_path / name)
    assert type(again) is type(aligner) and again.options() == aligner.options()
    assert torch.equal(again(batch).layer(3)[0], mapped.layer(3)[0])
    with pytest.raises(WrongKeySpace):
        aligner(capture_rotated(model_of("llama"), tokens_of(rows)).kv)


def test_every_aligner_on_disk_is_in_the_table():
    folder = Path(kvferry.align.__file__).parent
    modules = [importlib.import_module(f"kvferry.align.{path.stem}") for path in folder.glob("*.py")]
    written = {
        f"{found.__module__}:{found.__name__}"
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found) and issubclass(found, Aligner) and hasattr(found, "name")
    }
    assert written == set(ALIGNERS.values())


@pytest.mark.parametrize("receiver", ["qwen3", "gemma3", "gpt_neox"])
def test_zero_pad_keeps_what_fits_and_nothing_else(contract, receiver):
    wide = replace(contract, receiver=model_of(receiver).geometry)
    kv = capture(model_of("llama"), tokens_of(random_rows(1, 3))).kv
    mapped = ZeroPad(wide)(kv)
    for index, layer in enumerate(wide.receiver.layers):
        keys, own = mapped.layer(index)[0], kv.layer(index)[0]
        heads, dim = min(layer.heads, own.shape[1]), min(layer.key_dim, own.shape[3])
        assert torch.equal(keys[:, :heads, :, :dim], own[:, :heads, :, :dim])
        assert keys[:, heads:].abs().sum() == 0 and keys[..., dim:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("linear", "neighbours"),
        ("classwise", "neighbours"),
        ("hub_pair", "dim"),
        ("hub_pair", "neighbours"),
        ("hub_pair", "places"),
        ("kv_projector_mlp", "hidden_dim"),
        ("residual_mlp", "neighbours"),
        ("residual_mlp", "hidden"),
        ("narrow", "places"),
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused(contract: Contract, name: str, option: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{option} is {value}, out of range. Give at least 1"):
        aligner_class(name)(contract, **{option: value})


def test_a_token_comes_at_least_with_itself() -> None:
    with pytest.raises(UsageError, match="neighbours is 0"):
        look_back(torch.zeros(1, 2, 3), 0)
