"""Noise of a rate, and an importance learned behind it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvferry.align.contract import Contract
from kvferry.align.identity import Identity
from kvferry.cli import app
from kvferry.codec import CODECS
from kvferry.errors import UsageError
from kvferry.models.load import load
from kvferry.select.importance import IMPORTANCES
from kvferry.train.examples import Worlds
from kvferry.train.importance_fit import ImportanceRecipe, fit_importance
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.rate_noise import Channels
from kvferry.train.route import Route

TEXTS = ["Ann has tea in Oslo. Bob has a ring in Rome.", "Eve has a coin in Lima.", "Tom has silk in Hull."]


@pytest.fixture(scope="module")
def route():
    llama = load("llama")
    return Route(llama, llama)


@pytest.fixture(scope="module")
def sent(route):
    return route.sent(TEXTS)


def octaves(kv, value=0.0):
    return torch.full((kv.geometry.n_layers, 2, kv.n_batch, kv.n_tokens), value)


@pytest.mark.parametrize("codec", ["ecsq", "ecsq(profile=llama)"])
def test_fine_steps_leave_everything_and_coarse_ones_nothing_but_the_mean(sent, codec):
    channels = Channels.of(sent, CODECS.parse(codec))
    fine, coarse = (channels.through(sent, octaves(sent, value)) for value in (-14.0, 30.0))
    for layer in range(sent.geometry.n_layers):
        for which, own in enumerate(sent.layer(layer)):
            assert torch.allclose(fine.layer(layer)[which], own.float(), atol=0.02 * float(own.std()))
            middle = channels.mean[layer][which].expand_as(own)
            spread = channels.variance[layer][which].sqrt().expand_as(own)
            assert bool(((coarse.layer(layer)[which] - middle).abs() < 0.01 * spread).all())


def test_the_rate_is_the_one_asked_for_and_stays_so_when_a_slot_asks_for_more(sent):
    channels = Channels.of(sent, CODECS.parse("ecsq"))
    held = sent.present.any(0)
    wish = octaves(sent).requires_grad_()
    wanted = torch.tensor([900.0, 400.0, 1500.0])
    found = channels.at_rate(sent, wish, wanted)
    taken = (channels.bits(found) * held).sum((0, 1, 3))
    assert torch.allclose(taken, wanted, rtol=0.01)
    (slope,) = torch.autograd.grad(taken.sum(), wish)
    assert float(slope.abs().max()) < 1e-2 * float(wanted.max())


def test_an_importance_is_learned_and_the_seed_decides_it(route):
    recipe = ImportanceRecipe(
        n_measured=8, batch_size=4, loop=LoopRecipe(steps=4, learning_rate=3e-3, warmup=1)
    )
    aligner = Identity(Contract(route.sender.geometry, route.receiver.geometry))
    losses: list[float] = []
    first = fit_importance(route, aligner, Worlds(), recipe, lambda step: losses.append(step.loss))
    again = fit_importance(route, aligner, Worlds(), recipe)
    assert len(losses) == 4
    assert bool((first.outer.weight != 0).any())
    assert torch.equal(first.outer.weight, again.outer.weight)


@pytest.mark.parametrize("codec", ["int(bits=4)", "mixed"])
def test_a_codec_without_steps_is_refused(route, codec):
    aligner = Identity(Contract(route.sender.geometry, route.receiver.geometry))
    with pytest.raises(UsageError, match=r"no precision classes|no steps"):
        fit_importance(route, aligner, Worlds(), ImportanceRecipe(codec=codec, n_measured=2))


@pytest.mark.parametrize(
    "options",
    [{"lowest_bits": 0.0}, {"lowest_bits": 2.0}, {"batch_size": 0}, {"loop": LoopRecipe(steps=0)}],
)
def test_rates_and_sizes_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        ImportanceRecipe(**options)


def test_the_command_writes_a_folder_that_lagrangian_reads(tmp_path, route, sent):
    out = tmp_path / "importance"
    command = [
        "fit-importance",
        "--sender",
        "llama",
        "--receiver",
        "llama",
        "--steps",
        "1",
        "--batch-size",
        "2",
    ]
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 1
    importance = IMPORTANCES.load(out, sent.geometry)
    assert tuple(importance(sent).shape) == (sent.n_batch, sent.n_tokens)
    assert "rates of 0.02 to 0.3 bits" in (out / "README.md").read_text()
