"""Fusers trained by answers: what both have read, that training learns, that controls differ, what the verdict says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from contract import cache, geometry
from kvferry.codec import CODECS
from kvferry.errors import CodecNotCovered, UnknownName, UsageError
from kvferry.fuse.folder import load_fuser, make_fuser
from kvferry.kv import KV
from kvferry.lab.enrich.arms import Marks, Seed, fused_answers
from kvferry.lab.enrich.bench import EnrichResult, run_bench, save_enrich
from kvferry.lab.enrich.controls import averaged, closed, of_twins, zeroed
from kvferry.lab.enrich.settings import Settings
from kvferry.lab.enrich.sheets import enrich_sheet
from kvferry.lab.enrich.texts import PLACES, sentence_alone, told
from kvferry.lab.enrich.verdict import BESIDE, EXPLANATIONS, comparisons, verdict
from kvferry.lab.items import Worlds
from kvferry.metrics.paired import clustered, paired
from kvferry.models.load import load
from kvferry.train.both_read import Both, answer_loss, prompt_and_answer
from kvferry.train.fuser_fit import FuserRecipe, fit_fuser
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.sources.example import Example
from kvferry.train.sources.items import Items, example_of

SOURCE = Items("two_hop", 4)
RECIPE = FuserRecipe(
    options={"rank": 8, "width": 32},
    loop=LoopRecipe(steps=12, learning_rate=3e-3, warmup=1),
    prompts=16,
    start=32,
    batch_size=8,
)
(TWINS,) = Worlds(("two_hop",), 4).twins(8, seed=0)
ITEMS = [example_of(item) for item in TWINS.items]


@pytest.fixture(scope="module")
def models():
    return load("gemma3"), load("llama")


@pytest.fixture(scope="module")
def fitted(models):
    return fit_fuser(*models, SOURCE, RECIPE)


# What both have read


def test_slots_are_the_receivers_tokens_and_the_question_is_heard_or_not(models):
    whole, context = (Both(*models, hears=hears).read(ITEMS) for hears in ("prompt", "context"))
    own = whole.prompted.own
    assert (whole.arrived.n_batch, whole.arrived.n_tokens) == (own.n_batch, own.n_tokens)
    assert torch.equal(whole.arrived.present[0], own.present[0])
    for row, example in enumerate(ITEMS):
        inside = own.spans[row].start < len(example.context.encode())
        assert context.arrived.present[0, row].tolist() == (own.present[0, row].numpy() & inside).tolist()
        assert inside.sum() < len(inside)


def test_scored_tokens_are_the_answers(models):
    read = Both(*models).read(ITEMS)
    for row, example in enumerate(ITEMS):
        ids = read.after.ids[row][read.scored[row]]
        assert models[1].tokenizer.decode(ids) == prompt_and_answer(example)[1]


def test_an_example_without_an_answer_is_refused(models):
    with pytest.raises(UsageError, match="without an answer"):
        Both(*models).read([Example("Ann is in Oslo.", (("\nQ: Where is Ann?", False),))])


# Training


def test_training_learns_and_leaves_both_models_alone(models, fitted):
    before = [parameter.clone() for model in models for parameter in model.hf.parameters()]
    again = fit_fuser(*models, SOURCE, RECIPE)
    after = [parameter for model in models for parameter in model.hf.parameters()]
    assert all(map(torch.equal, before, after)) and all(parameter.requires_grad for parameter in after)
    assert not fitted.fuser.training and fitted.trained.steps == 12
    for one, other in zip(fitted.fuser.parameters(), again.fuser.parameters(), strict=True):
        assert torch.equal(one, other)
    seen = Both(*models).read(list(itertools.islice(SOURCE.examples("train", 0), 8)))
    fresh = make_fuser("gated_residual", models[0].geometry, models[1].geometry, RECIPE.options).eval()
    with torch.no_grad():
        losses = [answer_loss(fuser, seen).total.item() for fuser in (fitted.fuser, fresh)]
    assert losses[0] < losses[1] - 0.05


def test_a_fitted_fuser_is_kept_with_its_card(models, fitted, tmp_path):
    fitted.save(tmp_path / "f", said="Right in 98 %.")
    read, again = Both(*models).read(ITEMS), load_fuser(tmp_path / "f")
    with torch.no_grad():
        assert torch.equal(answer_loss(again, read).total, answer_loss(fitted.fuser, read).total)
    card = (tmp_path / "f" / "README.md").read_text()
    assert "gemma3 to llama" in card and "Right in 98 %." in card


def test_a_fuser_hears_what_the_wire_leaves_and_says_under_which_codecs(models, tmp_path):
    codecs = ("int(bits=2)", "ecsq(step=64)")
    recipe = replace(RECIPE, codecs=codecs, loop=LoopRecipe(steps=2, learning_rate=3e-3, warmup=1))
    fitted = fit_fuser(*models, SOURCE, recipe)
    fitted.save(tmp_path / "coded")
    again = load_fuser(tmp_path / "coded")
    assert again.coded_with == tuple(repr(CODECS.parse(codec)) for codec in codecs)
    again.require_codec(repr(CODECS.parse("int(bits=2)")))
    with pytest.raises(CodecNotCovered, match="int"):
        again.require_codec(repr(CODECS.parse("int(bits=8)")))
    assert "int(bits=2" in (tmp_path / "coded" / "README.md").read_text()
    both = Both(*models)
    clean, coded = both.read(ITEMS).arrived, both.read(ITEMS, CODECS.parse("int(bits=2)")).arrived
    assert not torch.equal(clean.groups[0].keys, coded.groups[0].keys)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 32}, {"start": 0}])
def test_recipes_are_checked(wrong):
    with pytest.raises(UsageError, match="prompts"):
        replace(RECIPE, **wrong)


def test_a_started_fuser_hears_all_directions_alike():
    """Whatever the scales and mixtures of the sender's channels, what is heard is white and centred."""
    arrived = cache(n_tokens=200, n_batch=4, seed=3)
    mixed = arrived.with_groups(
        tuple(
            replace(g, keys=g.keys * 0.03 + g.keys.flip(-1), values=g.values * 40 + 7) for g in arrived.groups
        )
    )
    fuser = make_fuser("gated_residual", arrived.geometry, geometry(model="ef"), {"rank": 2, "width": 16})
    own = cache(n_tokens=200, n_batch=4, seed=4)
    fuser.start(replace(own, geometry=fuser.receiver), mixed)
    heard = _heard(fuser, mixed)
    assert torch.allclose(heard.T @ heard / len(heard), torch.eye(16), atol=0.02)
    assert heard.mean(0).abs().max() < 1e-3


def _heard(fuser, kv: KV) -> torch.Tensor:
    parts = [part for g in kv.groups for part in (g.keys, g.values)]
    flat = torch.cat([part.permute(1, 3, 0, 2, 4).flatten(2) for part in parts], -1)[kv.present.all(0)]
    with torch.no_grad():
        return fuser.hear((flat - fuser.mean) / fuser.deviation)


def test_whitening_needs_more_tokens_than_channels():
    few = cache(n_tokens=2, n_batch=2)
    fuser = make_fuser("gated_residual", few.geometry, few.geometry)
    with pytest.raises(UsageError, match="4 tokens to whiten"):
        fuser.start(few, few)


# Controls


@torch.no_grad()
def test_controls_change_what_arrives_and_closed_gates_leave_the_receiver_alone(models, fitted):
    read, fuser = Both(*models).read(ITEMS), fitted.fuser
    changed = {"own": read.arrived}
    changed |= {way.__name__: way(read.arrived) for way in (zeroed, averaged, of_twins)}
    losses = {
        name: answer_loss(fuser, replace(read, arrived=kv)).total.item() for name, kv in changed.items()
    }
    assert len(set(losses.values())) == 4
    alone = fused_answers(models[1], read, [])
    assert fused_answers(models[1], read, [(closed(fuser), read.arrived)]) == alone
    assert all(gate.all() for gate in [fuser.open_gates()])  # and the original stays open


def test_the_mean_cache_is_the_same_for_all_and_keeps_the_slot():
    kv = cache(n_tokens=6, n_batch=3)
    kv.present[:, 0, :2] = False
    mean = averaged(kv)
    keys = kv.groups[0].keys
    assert torch.allclose(mean.groups[0].keys[:, 0], mean.groups[0].keys[:, 2])
    assert torch.allclose(mean.groups[0].keys[:, 0, :, 0], keys[:, 1:, :, 0].mean(1))
    assert torch.allclose(mean.groups[0].keys[:, 1, :, 5], keys[:, :, :, 5].mean(1))


def test_a_receiver_that_is_told_answers_as_the_sender(models):
    answers = TWINS.answers
    assert told(*models, TWINS.items, sentence_alone) == answers
    for how in PLACES.values():
        assert sum(map(str.__eq__, told(*models, TWINS.items, how), answers)) >= len(answers) - 1


# Statistics and verdict


def test_one_cluster_is_the_ordinary_interval():
    a, b = np.random.default_rng(0).integers(0, 2, (2, 300))
    one, plain = clustered(a, b, np.zeros(300)), paired(a, b)
    assert one.difference == plain.difference and one.p is None
    assert one.ci95 == pytest.approx(plain.ci95, abs=0.01)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not():
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(5), 200)
    alike = rng.random(1000) < 0.5
    apart = rng.random(1000) < np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 200)
    widths = [np.ptp(clustered(one, np.zeros(1000), labels).ci95) for one in (alike, apart)]
    plain = np.ptp(paired(alike, np.zeros(1000)).ci95)
    # Between seeds: a standard error of sqrt(.08 / 5) = .126, of items within: .012.
    assert widths[0] < 1.6 * plain and widths[1] == pytest.approx(2 * 1.96 * 0.126, rel=0.15)


def test_clusters_of_different_sizes_weigh_as_their_items():
    a = np.r_[np.ones(90), np.zeros(10)]
    found = clustered(a, np.zeros(100), np.r_[np.zeros(90), np.ones(10)])
    assert found.difference == 0.9 and found.ci95 == (0.0, 1.0)


@pytest.mark.parametrize("clusters", [[0, 0, 0], [0, 1, 1, 1]])
def test_clusters_must_fit_the_scores_and_hold_whole_blocks(clusters):
    with pytest.raises(UsageError):
        clustered([1, 0, 1, 1], [0, 0, 1, 0], clusters, block=2)


def seeds(**right: float) -> list[Seed]:
    """Three seeds of a hundred items; an arm has that share of them right."""
    arms = {"ours": 0.9, **dict.fromkeys([*EXPLANATIONS, *BESIDE], 0.2), **right}
    marks = {name: (np.arange(100) < round(100 * share)).astype(int) for name, share in arms.items()}
    return [Seed({name: Marks(own, own) for name, own in marks.items()}, {}, {}) for _ in range(3)]


def said(**right: float) -> list[str]:
    return verdict({one.b: one for one in comparisons(seeds(**right), ["ours"])})


def test_the_verdict_claims_only_what_beats_every_control():
    assert said()[0].startswith("ours beats every control")
    lines = said(same_model=0.9, text_to_text=1.0)
    assert "text_to_text explains the gain of ours (-0.100" in lines[0]
    assert "same_model may explain the gain of ours (+0.000" in lines[1]
    assert lines[2] == "ours beats receiver_only, mean, zeroed."


def test_what_is_no_control_is_told_beside_the_verdict():
    lines = said(answer_passed_on=1.0)
    assert lines[0].startswith("ours beats every control")
    assert "answer_passed_on" in lines[1] and "does better" in lines[1]


def test_the_bench_in_small(tmp_path):
    settings = Settings(n_facts=4, n_items=4, seeds=1, steps=1, prompts=32, fusers=("gated_residual", "c2c"))
    result = run_bench(settings)
    assert isinstance(result, EnrichResult)
    by_arm = {point.arm: point for point in result.points}
    assert {*settings.fusers, *EXPLANATIONS, *BESIDE, "closed_gates"} == set(by_arm)
    assert by_arm["closed_gates"].metrics == by_arm["receiver_only"].metrics
    assert by_arm["same_model"].sender == "llama" and by_arm["c2c"].latency_ms["fuse"] > 0
    assert len(enrich_sheet(result).cells) == len(by_arm)
    save_enrich(result, tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text().count('"arm"') >= len(by_arm)


def test_settings_are_checked():
    with pytest.raises(UnknownName, match="gated_residul"):
        Settings(fusers=("gated_residul",))
    with pytest.raises(UsageError, match="0 seeds"):
        Settings(seeds=0)
