"""Fusers: what they compute, that closed gates touch nothing, that arrival order and batching change nothing."""

import importlib
import inspect
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import kvferry.fuse
from contract import ORDINARY, RAGGED, cache, geometry, same
from kvferry.errors import (
    FolderError,
    ForeignModel,
    GridMismatch,
    ShapeMismatch,
    UnknownName,
    UsageError,
    WrongKeySpace,
)
from kvferry.fuse.c2c import C2CFuser, last_aligned
from kvferry.fuse.c2c_checkpoint import load_published
from kvferry.fuse.contract import Fuser
from kvferry.fuse.folder import fuser_class, load_fuser, make_fuser, save_fuser
from kvferry.fuse.gated_residual import GatedResidual
from kvferry.fuse.merge import Conflict, merge
from kvferry.fuse.pack import content_hash, join, pack
from kvferry.fuse.residual import add, enriched
from kvferry.fuse.space import to_space
from kvferry.fuse.table import FUSERS
from kvferry.kv import KV, Geometry, stack
from kvferry.lab.fusion_speed import (
    OURS,
    Settings,
    Size,
    fusion_sheet,
    published,
    random_cache,
    run_bench,
    save_fusion,
)
from kvferry.models.capture import capture, capture_rotated
from kvferry.models.enrich import all_but_last, enrich
from kvferry.models.generate import generate
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.state import empty, held, inject, put, read
from kvferry.models.tokens import Tokens
from tiny import model_of, random_rows, tokens_of

SMALL = {"gated_residual": {"rank": 4, "width": 6}, "c2c": {"hidden": 12, "inner": 10}}
RESIDUAL = ["gated_residual", "c2c"]
QWEN25, QWEN3 = Size("Qwen2.5-0.5B", 24, 2, 64), Size("Qwen3-0.6B", 28, 8, 128)


def filled(fuser: Fuser, scale: float = 0.3) -> Fuser:
    """Random weights, open gates, evaluation mode."""
    for name, parameter in fuser.named_parameters():
        nn.init.normal_(parameter, std=scale)
        if name.split(".")[-1] == "gate":
            nn.init.ones_(parameter)
    return fuser.eval()


def closed(fuser: Fuser) -> Fuser:
    for name, parameter in fuser.named_parameters():
        if name.split(".")[-1] == "gate":
            nn.init.constant_(parameter, -1.0)
    return fuser


def member(name: str, sender: Geometry, receiver: Geometry) -> Fuser:
    """One of the table, between the models that it allows."""
    if fuser_class(name).gives == "cache":
        sender = receiver
    return filled(make_fuser(name, sender, receiver, SMALL.get(name)))


def arrived_for(fuser: Fuser, n_tokens: int = 5, n_batch: int = 2, seed: int = 1) -> KV:
    """Numbers of the fuser's sender."""
    kv = cache(_shapes(fuser.sender), n_tokens, n_batch, seed=seed, space=fuser.space)
    return replace(kv, geometry=fuser.sender)


def own_for(fuser: Fuser, n_tokens: int = 5, n_batch: int = 2) -> KV:
    kv = cache(_shapes(fuser.receiver), n_tokens, n_batch, seed=2, space=fuser.space)
    return replace(kv, geometry=fuser.receiver)


def _shapes(of: Geometry):
    return tuple((layer.heads, layer.key_dim, layer.value_dim) for layer in of.layers)


def near(a: KV, b: KV, atol: float = 1e-5) -> None:
    assert torch.equal(a.present, b.present)
    for index in range(a.geometry.n_layers):
        held_slots = a.present[index][:, None, :, None]
        for got, want in zip(a.layer(index), b.layer(index), strict=True):
            assert torch.allclose(got * held_slots, want * held_slots, atol=atol)


def pairs_of_models():
    return model_of("llama"), model_of("gemma3")


# The table and the folders


def test_every_fuser_on_disk_is_in_the_table():
    folder = Path(kvferry.fuse.__file__).parent
    modules = [importlib.import_module(f"kvferry.fuse.{path.stem}") for path in folder.glob("*.py")]
    written = {
        f"{found.__module__}:{found.__name__}"
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found) and issubclass(found, Fuser) and hasattr(found, "name")
    }
    assert written == set(FUSERS.values())
    assert all(fuser_class(name).name == name for name in FUSERS)


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_keeps_the_contract(name, tmp_path):
    fuser = member(name, geometry(RAGGED), geometry(ORDINARY, model="ef"))
    own, arrived = own_for(fuser), arrived_for(fuser)
    fused = fuser(own, arrived)
    assert fused.geometry == fuser.receiver and fused.space == fuser.space
    for row, one in enumerate(fused.sequences()):
        near(one, next(fuser(own.take_batch([row]), arrived.take_batch([row])).sequences()))
    save_fuser(fuser, tmp_path / name, card="# card\n")
    again = load_fuser(tmp_path / name)
    assert type(again) is type(fuser) and again.options() == fuser.options()
    same(again(own, arrived), fused)
    with pytest.raises(ForeignModel, match="own cache"):
        fuser(replace(own, geometry=replace(own.geometry, model="00" * 32)), arrived)
    with pytest.raises(ForeignModel, match="arrived cache"):
        fuser(own, replace(arrived, geometry=replace(arrived.geometry, model="00" * 32)))
    with pytest.raises(WrongKeySpace):
        fuser(own, replace(arrived, space="rotated" if fuser.space == "content" else "content"))


@pytest.mark.parametrize("harm", ["no weights", "not json", "other name", "an aligner's"])
def test_a_broken_folder_is_refused(harm, tmp_path):
    folder = tmp_path / "a"
    save_fuser(member("gated_residual", geometry(), geometry()), folder, card="")
    config = folder / "config.json"
    if harm == "no weights":
        (folder / "model.safetensors").unlink()
    elif harm == "not json":
        config.write_text("{")
    elif harm == "other name":
        config.write_text(json.dumps({**json.loads(config.read_text()), "name": "gated_residul"}))
    else:
        config.write_text(json.dumps({"name": "linear", "options": {}, "contract": {}}))
    with pytest.raises(UnknownName if harm == "other name" else FolderError):
        load_fuser(folder)


@pytest.mark.parametrize("name", RESIDUAL)
def test_slots_must_correspond(name):
    fuser = member(name, geometry(), geometry(ORDINARY, model="ef"))
    with pytest.raises(GridMismatch, match="2 x 4 slots arrived for 2 x 5"):
        fuser(own_for(fuser), arrived_for(fuser, n_tokens=4))


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", FUSERS)
def test_progress_is_a_share(name, progress):
    with pytest.raises(UsageError, match="progress"):
        member(name, geometry(), geometry()).anneal(progress)


# GatedResidual: the batched pass against its formula, one row at a time


def by_the_formula(fuser: GatedResidual, own: KV, arrived: KV, layer: int, side: int) -> torch.Tensor:
    """`[heads, tokens, dim]` of the first sequence, from loops over rows, heads and tokens."""
    (bank, row) = next(
        (bank, row)
        for bank in fuser.banks
        for row, place in enumerate(zip(bank.layer_of.tolist(), bank.side_of.tolist(), strict=True))
        if place == (layer, side)
    )
    rank, states = fuser.rank, own.layer(layer)[side][0]
    out = torch.zeros_like(states)
    for token in range(own.n_tokens):
        heard = [part[:, 0, :, token].flatten() for g in arrived.groups for part in (g.keys, g.values)]
        latent = functional.gelu(fuser.hear((torch.cat(heard) - fuser.mean) / fuser.deviation))
        whitened = (states[:, token] - bank.mean[row]) / bank.deviation[row]
        hidden = bank.latent_in[row * rank : (row + 1) * rank] @ latent + bank.bias_in[row]
        hidden = functional.gelu(hidden + whitened.flatten() @ bank.own_in[row].flatten(0, 1))
        for head in range(states.shape[0]):
            weight = torch.sigmoid(bank.weight[row, head] @ hidden + bank.weight_bias[row, head, 0])
            content = hidden @ bank.content[row, head] * bank.deviation[row, head]
            out[head, token] = weight * content * (fuser.gate[layer, side] > 0)
    return out


@pytest.mark.parametrize(("sender", "receiver"), [(RAGGED, ORDINARY), (ORDINARY, RAGGED)])
@torch.no_grad()
def test_all_layers_in_one_pass_are_each_layer_alone(sender, receiver):
    fuser = member("gated_residual", geometry(sender), geometry(receiver, model="ef"))
    fuser.gate[1, 0] = -1
    own, arrived = own_for(fuser, n_batch=1), arrived_for(fuser, n_batch=1)
    fuser.standardise(cache(receiver, 30, seed=5, scale=3.0), cache(sender, 30, seed=6, scale=0.2))
    residual = fuser(own, arrived)
    for layer, side in itertools.product(range(len(receiver)), (0, 1)):
        want = by_the_formula(fuser, own, arrived, layer, side)
        assert torch.allclose(residual.layer(layer)[side][0], want, atol=1e-5)
        assert want.abs().max() > 1e-3 or (layer, side) == (1, 0)


def scaled(kv: KV, by: float) -> KV:
    return kv.with_groups(tuple(replace(g, keys=g.keys * by + by, values=g.values * by) for g in kv.groups))


@pytest.mark.parametrize("options", [{"rank": 0}, {"width": 0}])
def test_a_fuser_without_room_is_refused(options):
    with pytest.raises(UsageError, match="rank is"):
        make_fuser("gated_residual", geometry(), geometry(), options)


@torch.no_grad()
def test_standardised_fusers_do_not_see_units():
    """The same weights on caches in other units: the sender's leave the residual, the receiver's scale it."""
    plain, other = (member("gated_residual", geometry(RAGGED), geometry(model="ef")) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    own, arrived = own_for(plain), arrived_for(plain)
    plain.standardise(own, arrived)
    other.standardise(scaled(own, 40.0), scaled(arrived, 0.01))
    near(other(scaled(own, 40.0), scaled(arrived, 0.01)), scaled_only(plain(own, arrived), 40.0), atol=2e-3)


def scaled_only(kv: KV, by: float) -> KV:
    return kv.with_groups(tuple(replace(g, keys=g.keys * by, values=g.values * by) for g in kv.groups))


def test_constant_channels_are_no_division_by_zero():
    fuser = member("gated_residual", geometry(), geometry(model="ef"))
    fuser.standardise(cache(scale=0.0), cache(scale=0.0))
    fuser(own_for(fuser), arrived_for(fuser)).require_finite()


# Gates


def gates_in_training(name: str, n: int, temperature: float = 1.0) -> torch.Tensor:
    """Draws of the gate at logit 0."""
    fuser = make_fuser(name, geometry(), geometry(model="ef"), SMALL[name]).train()
    fuser.temperature.fill_(temperature)
    for parameter in fuser.parameters():
        nn.init.zeros_(parameter)
    if name == "gated_residual":
        return fuser._gate(n).flatten()
    return fuser.projectors[0].key._gate(torch.zeros(1, 2, n, 1), fuser.temperature).flatten()


@pytest.mark.parametrize(
    ("name", "share"), [("gated_residual", 0.5), ("c2c", 1 - torch.tensor(-1.0).exp().item())]
)
def test_gate_noise_is_unbiased_in_ours_and_as_published_in_theirs(name, share):
    """Ours is logistic: as often open as closed. One Gumbel opens with probability 1 - 1/e."""
    gates = gates_in_training(name, 20_000)
    assert ((gates > 0.5).float().mean() - share).abs() < 0.01
    if name == "gated_residual":  # a logistic variable through its own distribution function is uniform
        uniform = gates.sort().values - torch.linspace(0, 1, len(gates))
        assert uniform.abs().max() < 0.01


@pytest.mark.parametrize(("name", "hardest"), [("gated_residual", 0.1), ("c2c", 0.001)])
def test_gates_harden_as_training_goes_on(name, hardest):
    fuser = make_fuser(name, geometry(), geometry(), SMALL[name])
    temperatures = []
    for progress in (0, 0.5, 1):
        fuser.anneal(progress)
        temperatures.append(fuser.temperature.item())
    assert temperatures == pytest.approx([1, hardest**0.5, hardest])
    soft, hard = gates_in_training(name, 2_000), gates_in_training(name, 2_000, hardest)
    undecided = [((gates > 0.05) & (gates < 0.95)).float().mean() for gates in (soft, hard)]
    assert undecided[1] < undecided[0] / 3


def test_noise_differs_between_sequences_layers_and_sides():
    gate = make_fuser("gated_residual", geometry(), geometry(), SMALL["gated_residual"]).train()._gate(4)
    assert gate.shape == (3, 2, 4) and len(gate.unique()) == gate.numel()


@pytest.mark.parametrize("name", RESIDUAL)
def test_closed_gates_leave_every_bit(name):
    fuser = closed(member(name, geometry(RAGGED), geometry(RAGGED, model="ef")))
    own, arrived = own_for(fuser), arrived_for(fuser)
    for group in own.groups:
        group.keys[..., 0], group.values[..., 1] = -0.0, 0.0
    fused = enriched(own, [(fuser, arrived)])
    for before, after in zip(own.groups, fused.groups, strict=True):
        for one, other in ((before.keys, after.keys), (before.values, after.values)):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_a_layer_with_closed_gates_is_not_written_whatever_arrives():
    fuser = member("gated_residual", geometry(), geometry(model="ef"))
    nn.init.constant_(fuser.gate[1], -1.0)
    own, arrived = own_for(fuser), arrived_for(fuser)
    arrived.groups[0].keys[:] = torch.nan
    fused = enriched(own, [(fuser, arrived)])
    assert torch.equal(fused.layer(1)[0], own.layer(1)[0]) and fused.layer(0)[0].isnan().all()
    assert fuser.open_gates().tolist() == [[True, True], [False, False], [True, True]]


@pytest.mark.parametrize("name", RESIDUAL)
def test_absent_slots_are_not_written_and_may_hold_anything(name):
    fuser = member(name, geometry(), geometry(model="ef")).train()
    own, arrived = own_for(fuser), arrived_for(fuser)
    own.present[1, 0, 2] = False
    arrived.present[:, 1, 4] = False
    own.groups[0].keys[1, 0, :, 2] = torch.nan
    arrived.groups[0].values[:, 1, :, 4] = torch.inf
    fused = enriched(own, [(fuser, arrived)])
    changed = torch.stack([(fused.layer(i)[1] != own.layer(i)[1]).any(3).any(1) for i in range(3)])
    want = torch.ones_like(changed)
    want[1, 0, 2] = want[:, 1, 4] = False
    assert torch.equal(changed, want)
    fused.groups[0].values.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fuser.parameters())


# C2C


def test_the_published_pair_has_the_published_number_of_parameters():
    with torch.device("meta"):
        c2c = C2CFuser(QWEN25.geometry(), QWEN3.geometry())
        ours = GatedResidual(QWEN25.geometry(), QWEN3.geometry())
    assert sum(p.numel() for p in c2c.parameters()) == 477_848_056
    assert sum(t.numel() for t in ours.state_dict().values()) * 4 <= 50e6
    assert c2c.sources == [0] * 4 + list(range(24))


@pytest.mark.parametrize(("n_sender", "n_receiver"), [(24, 28), (16, 28), (36, 28), (5, 5)])
def test_last_layers_correspond(n_sender, n_receiver):
    sources = last_aligned(n_sender, n_receiver)
    assert sources[-1] == n_sender - 1 and len(sources) == n_receiver
    assert all(b - a in (0, 1) and (b > a or a == 0) for a, b in itertools.pairwise(sources))


@pytest.mark.parametrize("options", [{"sources": [0, 1]}, {"sources": [0, 1, 3]}, {"depth": 2}])
def test_layer_maps_and_depths_are_checked(options):
    with pytest.raises(UsageError, match=r"sources|depth"):
        make_fuser("c2c", geometry(), geometry(), {**SMALL["c2c"], **options})


class Checkpoint:
    """A checkpoint in the published layout with random weights, and its algorithm from the paper's formulas alone."""

    def __init__(self, folder: Path, sender: Geometry, receiver: Geometry, hidden=12, inner=10, depth=4):
        self.folder, self.depth, self.tensors = folder, depth, []
        self.sources = [2, 0, 1]
        folder.mkdir()
        table = {"0": {"1": {str(i): [[s, i], [0, 0]] for i, s in enumerate(self.sources)}}}
        (folder / "projector_config.json").write_text(json.dumps(table))
        for number, source in enumerate(self.sources):
            own, heard = receiver.layers[number], sender.layers[source]
            arguments = {
                "source_dim": heard.key_dim,
                "target_dim": own.key_dim,
                "source_num_heads": heard.heads,
                "target_num_heads": own.heads,
                "intermediate_dim": inner,
                "hidden_dim": hidden,
                "num_layers": depth,
                "dropout": 0.1,
                "dtype": {"__type__": "torch.dtype", "value": "float32"},
            }
            saved = {"class": "C2CProjector", "init_args": arguments}
            (folder / f"projector_{number}.json").write_text(json.dumps(saved))
            width = heard.heads * heard.key_dim + own.heads * own.key_dim
            self.tensors.append(self._random(width, own.heads, own.heads * own.key_dim, hidden, inner))
            torch.save(self.tensors[-1], folder / f"projector_{number}.pt")

    def _random(self, width, heads, out, hidden, inner):
        shapes = {}
        for side in ("key", "value"):
            linears = {"in": (hidden, width), "scalar_head": (heads, hidden), "proj_out": (out, hidden)}
            for name, shape in linears.items():
                shapes[f"{side}_{name}.weight"], shapes[f"{side}_{name}.bias"] = shape, shape[:1]
            blocks = [("mlp1", 0, inner), ("scalar_mlp2", 0, hidden)]
            blocks += [("proj_mlp2", i, inner) for i in range(self.depth - 2)]
            for name, i, middle in blocks:
                shapes[f"{side}_{name}.blocks.{i}.norm.weight"] = (hidden,)
                shapes[f"{side}_{name}.blocks.{i}.w1.weight"] = (middle, hidden)
                shapes[f"{side}_{name}.blocks.{i}.w2.weight"] = (hidden, middle)
            shapes[f"{side}_gate_logit"] = ()
        tensors = {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}
        tensors |= {"key_gate_logit": torch.tensor(0.2), "value_gate_logit": torch.tensor(-0.2)}
        return {**tensors, "gate_temperature": torch.tensor(0.001)}

    def output(self, layer: int, side: str, own: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
        """`R + g w P` for `[heads, tokens, dim]`."""
        found = {k.removeprefix(f"{side}_"): v for k, v in self.tensors[layer].items()}
        heads, n_tokens, dim = own.shape

        def linear(name, x):
            return x @ found[f"{name}.weight"].T + found[f"{name}.bias"]

        def block(name, x):
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * found[f"{name}.norm.weight"]
            return x + functional.gelu(normed @ found[f"{name}.w1.weight"].T) @ found[f"{name}.w2.weight"].T

        both = [states.transpose(0, 1).reshape(n_tokens, -1) for states in (arrived, own)]
        shared = block("mlp1.blocks.0", linear("in", torch.cat(both, -1)))
        deep = shared
        for i in range(self.depth - 2):
            deep = block(f"proj_mlp2.blocks.{i}", deep)
        content = linear("proj_out", deep).reshape(n_tokens, heads, dim).transpose(0, 1)
        weight = torch.sigmoid(linear("scalar_head", block("scalar_mlp2.blocks.0", shared)))
        return own + float(found["gate_logit"] > 0) * weight.T.unsqueeze(-1) * content


read_tensors = partial(torch.load, weights_only=True)
THREE = ((2, 4, 4), (1, 6, 6), (3, 2, 2))


@torch.no_grad()
def test_a_published_checkpoint_does_what_was_published(tmp_path):
    sender, receiver = geometry(THREE), geometry(THREE[::-1], model="ef")
    checkpoint = Checkpoint(tmp_path / "c2c", sender, receiver)
    fuser = load_published(checkpoint.folder, sender, receiver, read_tensors)
    assert fuser.sources == checkpoint.sources and not fuser.training
    assert fuser.temperature.item() == pytest.approx(0.001)
    own, arrived = own_for(fuser, n_batch=1), arrived_for(fuser, n_batch=1)
    fused = enriched(own, [(fuser, arrived)])
    for layer, source in enumerate(checkpoint.sources):
        for side, name in enumerate(("key", "value")):
            mine, theirs = own.layer(layer)[side][0], arrived.layer(source)[side][0]
            want = checkpoint.output(layer, name, mine, theirs)
            assert torch.allclose(fused.layer(layer)[side][0], want, atol=1e-4)
            assert torch.equal(want, mine) == (name == "value")


@pytest.mark.parametrize("harm", ["a tensor more", "a tensor less", "no file", "other models", "two senders"])
def test_other_checkpoints_are_refused(harm, tmp_path):
    sender, receiver = geometry(THREE), geometry(THREE[::-1], model="ef")
    folder = Checkpoint(tmp_path / "c2c", sender, receiver).folder
    weights = folder / "projector_1.pt"
    tensors = read_tensors(weights)
    if harm == "a tensor more":
        torch.save({**tensors, "key_other": torch.zeros(1)}, weights)
    elif harm == "a tensor less":
        torch.save({k: v for k, v in tensors.items() if k != "key_in.bias"}, weights)
    elif harm == "no file":
        weights.unlink()
    elif harm == "other models":
        sender, receiver = receiver, sender
    else:
        table = json.loads((folder / "projector_config.json").read_text())
        (folder / "projector_config.json").write_text(json.dumps({"0": {**table["0"], "2": {}}}))
    with pytest.raises(FolderError):
        load_published(folder, sender, receiver, read_tensors)


# Key spaces and sums


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "llama-dynamic", "smollm3"])
def test_either_space_is_the_others_rotation(name):
    model, tokens = model_of(name), tokens_of(random_rows(2, 12))
    content, rotated = capture(model, tokens).kv, capture_rotated(model, tokens).kv
    near(to_space(content, "rotated"), rotated)
    near(to_space(rotated, "content"), content)
    assert to_space(content, "content") is content


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_adding_before_or_after_rotation_is_the_same(name):
    model, tokens = model_of(name), tokens_of(random_rows(2, 9))
    own = capture(model, tokens).kv
    fuser = filled(make_fuser("gated_residual", model.geometry, model.geometry, SMALL["gated_residual"]))
    after = enriched(to_space(own, "rotated"), [(fuser, own)])
    near(after, to_space(enriched(own, [(fuser, own)]), "rotated"))


def test_what_is_added_must_fit():
    own = cache()
    for wrong in (cache(n_tokens=6), cache(space="rotated"), replace(own, geometry=geometry(model="ef"))):
        with pytest.raises(ShapeMismatch, match="residual"):
            add(own, wrong)
    fuser = member("replace", geometry(), geometry())
    with pytest.raises(UsageError, match="whole cache"):
        enriched(own, [(fuser, own)])
    assert enriched(own, []) is own


# Several senders


def residuals(n: int, seed: int, n_batch: int = 1) -> list[KV]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        present = torch.rand(4, n_batch, 5, generator=generator) < 0.7
        out.append(cache(RAGGED, 5, n_batch, present, seed=seed + i, scale=10.0 ** float(3 * i - 4)))
    return out


@given(
    order=st.permutations(range(4)),
    seed=st.integers(0, 99),
    conflict=st.sampled_from(["sum", "mean", "strongest"]),
)
def test_arrival_changes_no_bit_of_a_merged_residual(order, seed, conflict):
    parts = residuals(4, seed)
    same(merge([parts[i] for i in order], conflict), merge(parts, conflict))


def stacked(parts: list[KV], layer: int, side: int):
    return (
        torch.stack([kv.layer(layer)[side] for kv in parts]),
        torch.stack([kv.present[layer] for kv in parts])[:, :, None, :, None],
    )


def test_conflicts_are_solved_as_said():
    parts = residuals(3, 7, n_batch=2)
    total, mean, strongest = (merge(parts, conflict) for conflict in ("sum", "mean", "strongest"))
    sizes = torch.zeros(3, 4, 2, 5)
    for layer, side in itertools.product(range(4), (0, 1)):
        states, present = stacked(parts, layer, side)
        held_states = states.double() * present
        assert torch.allclose(total.layer(layer)[side].double(), held_states.sum(0))
        count = present.sum(0).clamp(min=1)
        assert torch.allclose(mean.layer(layer)[side].double(), held_states.sum(0) / count)
        sizes[:, layer] += held_states.square().sum((2, 4))
    for layer, batch, token in itertools.product(range(4), range(2), range(5)):
        if sizes[:, layer, batch, token].any():
            winner = int(sizes[:, layer, batch, token].argmax())
            want = parts[winner].layer(layer)[1][batch, :, token]
            assert torch.equal(strongest.layer(layer)[1][batch, :, token], want)
    assert torch.equal(total.present, torch.stack([kv.present for kv in parts]).any(0))
    same(merge([parts[0], parts[0]], "strongest"), merge([parts[0], parts[0]], "mean"))


def test_gradients_pass_through_a_merge():
    values = [torch.randn(3, 1, 2, 7, 4, requires_grad=True) for _ in range(3)]
    parts = [
        kv.with_groups((replace(kv.groups[0], values=v),))
        for kv, v in zip([cache()] * 3, values, strict=True)
    ]
    merge(parts).groups[0].values.sum().backward()
    assert all(torch.equal(v.grad, torch.ones_like(v)) for v in values)


def test_merging_refuses_what_does_not_belong_together():
    one = cache()
    with pytest.raises(UsageError, match="no residuals"):
        merge([])
    with pytest.raises(ShapeMismatch):
        merge([one, cache(n_tokens=6)])


@pytest.mark.parametrize("conflict", ["sum", "mean", "strongest"])
@torch.no_grad()
def test_senders_of_all_kinds_in_any_order(conflict: Conflict):
    receiver = model_of("qwen3").geometry
    names = ["llama", "gemma3", "llama"]
    kinds = ["gated_residual", "c2c", "gated_residual"]
    tokens = tokens_of(random_rows(2, 6))
    own = capture_rotated(model_of("qwen3"), tokens).kv
    senders = []
    for name, kind in zip(names, kinds, strict=True):
        model = model_of(name)
        senders.append(
            (filled(make_fuser(kind, model.geometry, receiver, SMALL[kind])), capture(model, tokens).kv)
        )
    want = enriched(own, senders, conflict)
    for order in itertools.permutations(range(3)):
        same(enriched(own, [senders[i] for i in order], conflict), want)


# Packing


@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_arrival_changes_no_bit_of_a_packed_cache(order, seed):
    parts = residuals(3, seed, n_batch=2)
    strides = [1.0, 0.5, 2.0]
    same(pack([parts[i] for i in order], [strides[i] for i in order]), pack(parts, strides))


def test_a_batch_packs_to_what_its_members_pack_to():
    parts = residuals(3, 3, n_batch=2)
    for row, packed in enumerate(pack(parts).sequences()):
        same(packed, next(pack([kv.take_batch([row]) for kv in parts]).sequences()))


def test_packed_caches_stand_one_after_the_other_and_twice_is_once():
    one, two = cache(n_tokens=4), cache(n_tokens=3, seed=1)
    packed = pack([one, two, one])
    assert packed.n_tokens == 7 and packed.positions.flatten().tolist() == list(range(7))
    first, second = sorted([one, two], key=content_hash)
    same(packed, join([first, second]))
    assert pack([one], [2.0]).positions.flatten().tolist() == [0, 2, 4, 6]
    gap = two.take_tokens(torch.tensor([0, 2]))
    assert join([gap, one]).positions.flatten().tolist() == [0, 2, 3, 4, 5, 6]


def test_packing_refuses_what_does_not_belong_together():
    with pytest.raises(UsageError, match="no caches"):
        pack([])
    with pytest.raises(ShapeMismatch, match="batches"):
        pack([cache(), cache(n_batch=2)])
    with pytest.raises(ShapeMismatch, match="different models"):
        join([cache(), cache(RAGGED)])
    with pytest.raises(WrongKeySpace):
        pack([cache(space="rotated")])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_a_packed_relay_reads_as_if_injected_one_by_one(name):
    model, rows = model_of(name), random_rows(2, 6)
    parts = [capture(model, tokens_of([row])).kv for row in rows]
    after = tokens_of([[7, 8, 9]])
    first, second = sorted(parts, key=content_hash)
    state = empty(model)
    inject(state, first, torch.arange(6).unsqueeze(0), torch.tensor([6]))
    inject(state, second, torch.arange(6, 12).unsqueeze(0), torch.tensor([12]))
    want = read(state, after)
    for order in itertools.permutations(parts):
        got = take_over(model, pack(list(order)), 1.0, after)[1]
        assert (got - want).abs().max() <= 1e-5


@torch.no_grad()
def test_prepended_caches_come_first_and_replaced_ones_are_gone():
    model, rows = model_of("llama"), random_rows(2, 5)
    own, arrived = (capture(model, tokens_of([row])).kv for row in rows)
    prepend, replaced = (make_fuser(name, model.geometry, model.geometry) for name in ("prepend", "replace"))
    same(prepend(own, arrived), join([arrived, own]))
    assert replaced(own, arrived) is arrived


# The receiver


def prompts(lengths=(9, 6)) -> Tokens:
    rows = random_rows(len(lengths), max(lengths))
    return tokens_of([row[:n] for row, n in zip(rows, lengths, strict=True)])


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama-dynamic"])
def test_a_state_gives_what_capture_gives_and_takes_it_back(name):
    model, tokens = model_of(name), prompts()
    state, untouched = empty(model, 2), empty(model, 2)
    for one in (state, untouched):
        read(one, tokens)
    kv = held(state, tokens.spans)
    same(kv, replace(capture_rotated(model, tokens).kv, call_length=0))
    put(state, held(state, tuple(spans.take(np.arange(4)) for spans in tokens.spans)))
    more = tokens_of([[5], [6]])
    assert torch.equal(read(state, more), read(untouched, more))


def test_states_refuse_caches_of_other_shapes():
    model, tokens = model_of("llama"), prompts()
    state = empty(model, 2)
    read(state, tokens)
    kv = held(state, tokens.spans)
    with pytest.raises(ShapeMismatch, match="10 tokens of 9"):
        held(state, tuple(spans.widen(10) for spans in tokens.spans))
    with pytest.raises(ShapeMismatch, match="1 x 9 slots"):
        put(state, kv.take_batch([0]))
    with pytest.raises(WrongKeySpace):
        put(state, to_space(kv, "content"))
    with pytest.raises(ForeignModel):
        put(state, replace(kv, geometry=replace(kv.geometry, model="00" * 32)))


def sent(fuser: Fuser, sender: Model, tokens: Tokens) -> list[tuple[Fuser, KV]]:
    return [(fuser, capture(sender, tokens).kv)]


@pytest.mark.parametrize("kind", RESIDUAL)
@pytest.mark.parametrize("receiver", ["qwen3", "gemma3", "phi3-longrope"])
@torch.no_grad()
def test_closed_gates_and_fresh_fusers_leave_the_logits_bit_for_bit(kind, receiver):
    model, sender, tokens = model_of(receiver), model_of("llama"), prompts()
    prompt, last = all_but_last(tokens)
    alone, want = enrich(model, prompt, last, [])
    fuser = filled(make_fuser(kind, sender.geometry, model.geometry, SMALL[kind]))
    opened = enrich(model, prompt, last, sent(fuser, sender, prompt))[1]
    assert (opened - want).abs().max() > 1e-3, "open gates should matter"
    fresh = make_fuser(kind, sender.geometry, model.geometry, SMALL[kind]).eval()
    for untouched in (closed(fuser), fresh):
        state, got = enrich(model, prompt, last, sent(untouched, sender, prompt))
        assert torch.equal(got, want)
        assert torch.equal(read(state, tokens_of([[5], [6]])), read(alone, tokens_of([[5], [6]])))
        alone, _ = enrich(model, prompt, last, [])


@torch.no_grad()
def test_an_enriched_receiver_that_hears_nothing_is_the_receiver():
    model, tokens = model_of("gemma3"), prompts()
    prompt, last = all_but_last(tokens)
    state, got = enrich(model, prompt, last, [])
    plain = empty(model, 2)
    assert (got - read(plain, tokens)).abs().max() <= 1e-5
    answers = generate(state, got[:, -1], max_new_tokens=4)
    assert [answer.ids for answer in answers] == [
        answer.ids for answer in generate(plain, got[:, -1], max_new_tokens=4)
    ]


@pytest.mark.parametrize("kind", RESIDUAL)
@torch.no_grad()
def test_a_padded_batch_is_its_members(kind):
    model, sender, tokens = model_of("gemma3"), model_of("llama"), prompts((9, 4))
    fuser = filled(make_fuser(kind, sender.geometry, model.geometry, SMALL[kind]))
    prompt, last = all_but_last(tokens)
    _, together = enrich(model, prompt, last, sent(fuser, sender, prompt))
    for row in range(2):
        one, end = all_but_last(tokens_of([tokens.row(row)[0]]))
        _, alone = enrich(model, one, end, sent(fuser, sender, one))
        assert (together[row] - alone[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_what_stands_in_padding_is_not_heard():
    model, sender, tokens = model_of("qwen3"), model_of("llama"), prompts((9, 4))
    fuser = filled(make_fuser("gated_residual", sender.geometry, model.geometry, SMALL["gated_residual"]))
    prompt, last = all_but_last(tokens)
    arrived = capture(sender, prompt).kv
    noisy = arrived.with_groups(
        tuple(replace(g, keys=g.keys.clone(), values=g.values.clone()) for g in arrived.groups)
    )
    for group in noisy.groups:
        group.keys[:, 1, :, :5] = 1e4
    got, want = (enrich(model, prompt, last, [(fuser, kv)])[1] for kv in (noisy, arrived))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_a_fuser_learns_what_the_receiver_should_say(kind):
    """Plain backward passes through the frozen receiver reach every weight, and the loss falls."""
    model, sender, tokens = model_of("qwen3"), model_of("llama"), prompts((7, 7, 5, 6))
    fuser = make_fuser(kind, sender.geometry, model.geometry, SMALL[kind]).train()
    prompt, last = all_but_last(tokens)
    given = sent(fuser, sender, prompt)
    if isinstance(fuser, GatedResidual):
        fuser.standardise(capture(model, prompt).kv, given[0][1])
    wanted = torch.tensor([5, 6, 7, 8])
    optimizer = torch.optim.Adam(fuser.parameters(), 0.01)
    losses = []
    for step in range(25):
        fuser.anneal(step / 25)
        loss = functional.cross_entropy(enrich(model, prompt, last, given)[1][:, -1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    silent = [name for name, p in fuser.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert silent == []


# The bench


def test_the_published_way_computes_what_the_fuser_does():
    sender, receiver = Size("a", 3, 2, 8), Size("b", 4, 2, 16)
    fuser = filled(C2CFuser(sender.geometry(), receiver.geometry(), hidden=16, inner=16))
    own, arrived = (
        random_cache(s.geometry(), "rotated", 6, "cpu", torch.float32) for s in (receiver, sender)
    )
    with torch.no_grad():
        near(published(fuser, own, arrived), enriched(own, [(fuser, arrived)]), atol=1e-6)
    assert not any(module._forward_hooks for module in fuser.modules())


def test_a_small_bench_of_fusers(tmp_path):
    settings = Settings(Size("a", 2, 1, 8), Size("b", 3, 2, 8), tokens=6, repeats=2)
    result = run_bench(settings, lambda _: None)
    save_fusion(result, tmp_path / "fuse.json")
    saved = json.loads((tmp_path / "fuse.json").read_text())
    assert saved["points"][0]["arm"] == OURS
    assert all(point["latency_ms"]["fuse"] > 0 for point in saved["points"])
    sheet = fusion_sheet(result)
    assert len(sheet.cells) == len(result.points) and sheet.cells[1][3] == "1.0"


def test_stacked_caches_join_like_their_members():
    """Padding in front of a shorter member moves nothing."""
    long, short = cache(n_tokens=5), cache(n_tokens=3, seed=1)
    batch = stack([long, short])
    own = cache(n_tokens=2, n_batch=2, seed=2)
    for row, alone in enumerate((long, short)):
        joined = list(join([batch, own]).sequences())[row]
        assert torch.equal(joined.positions, join([alone, own.take_batch([row])]).positions)
