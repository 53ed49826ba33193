"""Fitting end to end on small trained models, and every step of it against its definition."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import contract
from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import flatten, with_neighbours
from kvferry.align.folder import aligner_class, load_aligner
from kvferry.align.linear import Linear
from kvferry.align.receiver_grid import N_CLASSES, classes_of, on_receiver_grid
from kvferry.align.ridge import Sums, solve
from kvferry.align.token_means import TokenMeans
from kvferry.cli import app
from kvferry.codec import CODECS
from kvferry.errors import BadSpec, ModelRefused, TrainingDiverged, UnknownName, UsageError
from kvferry.fuse.layout import relay_layout
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.load import Model, load
from kvferry.models.tokens import encode
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.train import closed
from kvferry.train import fit as fitting
from kvferry.train.answer_loss import answer_scores, continuations
from kvferry.train.checkpoint import NAME
from kvferry.train.closed import fresh, neighbours_of, rehearse, solve_into, takes_penalty
from kvferry.train.examples import Example, Split, Worlds
from kvferry.train.fit import Fitted, Material, Watch, closed_form, fit, frozen, train
from kvferry.train.loop import Step
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.paired import Pairs, collect, targets
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.report import report_fit
from kvferry.train.route import Route
from kvferry.train.scores import mean_cache, other_contexts
from kvferry.train.trainable import trainable

CODECS_OF_RECIPE = ("raw(dtype=float16)", "int(bits=8)")
RECIPE = FitRecipe(
    "linear(neighbours=1)",
    CODECS_OF_RECIPE,
    DataRecipe(texts=80, batch_size=2),
    loop=LoopRecipe(steps=3, warmup=1, checkpoint_every=1),
)
TEXTS = ["Ann keeps 17 rings in the barn.", "Bob has salt and rope.", "Cleo met Dan in Oslo."]


def as_it_is(kv):
    return kv


@dataclass(frozen=True)
class Short:
    """The short ones of the zoo's worlds."""

    name: str = "short"
    longest: int = 130

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        found = Worlds(n_questions=3, n_alike=4).examples(split, seed)
        return (example for example in found if len(example.context) <= self.longest)


@pytest.fixture(scope="module", autouse=True)
def little_to_measure():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "N_HELD_OUT", 16)
        patch.setattr(fitting, "PENALTIES", (1e-4, 1e-2))
        patch.setattr("kvferry.train.report.N_FIDELITY", 4)
        yield


@pytest.fixture(scope="module")
def llama() -> Model:
    return load("llama")


@pytest.fixture(scope="module")
def qwen() -> Model:
    return load("qwen3")


@pytest.fixture(scope="module")
def gemma() -> Model:
    return load("gemma3")


# Pairs


@pytest.mark.parametrize("grid", ["sender", "receiver"])
def test_sums_are_those_of_all_pairs_in_one_table(llama, gemma, grid):
    """Batches, classes and codecs only cut the table into pieces."""
    route = Route(llama, gemma, grid)
    coded = CODECS.parse("int(bits=4)").roundtrip
    pairs = collect(route, TEXTS, [as_it_is, coded], neighbours=2, batch_size=2)
    sent = route.sent(TEXTS)
    entries, paired = targets(sent, route.held(TEXTS))
    x = torch.cat([with_neighbours(trip(sent), 2)[paired] for trip in (as_it_is, coded)])
    close(pairs.sums, Sums.of(x, entries[paired].repeat(2, 1)), 1e-4)
    assert len(pairs.classes) == (N_CLASSES if grid == "receiver" else 1)
    assert pairs.n_sent == int(sent.present[0].sum())
    assert int(pairs.tokens.counts.sum()) == int(paired.sum()), "once, however many codecs"


def test_the_sums_of_a_class_are_those_of_its_tokens(llama, gemma):
    route = Route(llama, gemma, "receiver")
    pairs, sent = collect(route, TEXTS, [as_it_is]), route.sent(TEXTS)
    entries, paired = targets(sent, route.held(TEXTS))
    counts = [int((paired & (classes_of(sent) == index)).sum()) for index in range(N_CLASSES)]
    assert [sums.n for sums in pairs.classes] == counts and sum(map(bool, counts)) > 1
    which = paired & (classes_of(sent) == 1)
    close(pairs.classes[1], Sums.of(flatten(sent)[which], entries[which]), 1e-4)


def test_narrowed_pairs_are_those_collected_with_fewer_neighbours(llama, gemma):
    route = Route(llama, gemma, "receiver")
    wide = collect(route, TEXTS, [as_it_is], neighbours=3)
    for neighbours in (1, 2, 3):
        narrow = collect(route, TEXTS, [as_it_is], neighbours=neighbours)
        got = wide.narrowed(neighbours)
        assert (got.neighbours, got.stride) == (neighbours, narrow.stride)
        for one, other in zip(got.classes, narrow.classes, strict=True):
            close(one, other, 1e-12)


def close(got: Sums, want: Sums, tolerance: float) -> None:
    assert got.n == want.n
    for name in ("x", "y", "xx", "xy", "yy"):
        one, other = getattr(got, name), getattr(want, name)
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_the_grid_decides_the_slots(llama, gemma):
    sent, moved = (Route(llama, gemma, grid).sent(TEXTS) for grid in ("sender", "receiver"))
    assert sent.spans[0].overlap is None
    wanted = on_receiver_grid(sent, encode(gemma.tokenizer, TEXTS).spans)
    contract.same(moved, wanted)
    assert torch.equal(classes_of(moved), classes_of(wanted))
    assert Route(llama, gemma).held(TEXTS).geometry == gemma.geometry


def test_texts_that_give_no_pairs_are_refused(llama, gemma):
    with pytest.raises(UsageError, match="no token pairs"):
        collect(Route(llama, gemma), [], [as_it_is])


# Closed forms

N_CHANNELS = 3
SENDER = contract.geometry(((1, 2, 2), (1, 2, 2)))
RECEIVER = contract.geometry(((1, 2, 1), (1, 2, 1), (1, 2, 1)), model="ef")
BETWEEN = Contract(SENDER, RECEIVER, grid="receiver")


def made_up(neighbours: int) -> Pairs:
    """Pairs of two small geometries, all classes, a noisy affine map."""
    n_in, n_out = neighbours * SENDER.floats_per_token, RECEIVER.floats_per_token
    weight, tokens, classes = torch.randn(n_in, n_out), TokenMeans(), []
    for index in range(N_CLASSES):
        x = torch.randn(60, n_in)
        y = x @ weight + torch.randn(60, n_out) + index
        classes.append(Sums.of(x, y))
        tokens.add([bytes([index % 3])] * 60, x[:, :4], y)
    return Pairs(neighbours, classes, tokens, 480, 480)


OWN_SOLVERS = {
    "blockwise": lambda own, pairs: own.solve_from(pairs.sums, 0.1),
    "classwise": lambda own, pairs: own.solve_from(pairs.classes, 0.1),
    "headwise": lambda own, pairs: own.start_from(pairs.sums, 0.1),
    "kv_projector": lambda own, pairs: own.start_from(pairs.sums, 0.1),
    "linear": lambda own, pairs: own.load_state_dict(
        dict(zip(("weight", "bias"), solve(pairs.sums, 0.1), strict=True))
    ),
    "low_rank": lambda own, pairs: own.solve_from(pairs.sums, 0.1),
    "mean_only": lambda own, pairs: own.solve_from(pairs.sums),
    "narrow": lambda own, pairs: own.start_from([pairs.sums], 0.1),
    "procrustes": lambda own, pairs: own.solve_from(pairs.sums),
    "residual_mlp": lambda own, pairs: own.start_from(pairs.sums, *solve(pairs.sums, 0.1)),
    "token_table": lambda own, pairs: own.solve_from(pairs.tokens),
}
OPTIONS = {
    "low_rank": "(rank=5, neighbours=2)",
    "narrow": "(rank=5, neighbours=2)",
    "residual_mlp": "(neighbours=2, hidden=4)",
}


def test_every_closed_form_is_tried():
    assert set(OWN_SOLVERS) == set(closed._SOLVERS)
    without = {"mean_only", "procrustes", "token_table"}
    assert {name for name in OWN_SOLVERS if takes_penalty(name)} == set(OWN_SOLVERS) - without
    assert not takes_penalty("elastic")


@pytest.mark.parametrize("name", OWN_SOLVERS)
def test_a_closed_form_is_the_one_of_its_class(name):
    spec = name + OPTIONS.get(name, "")
    pairs = made_up(neighbours_of(spec))
    aligner, own = (seeded(spec, pairs) for _ in range(2))
    before = {key: value.clone() for key, value in aligner.state_dict().items()}
    solve_into(aligner, pairs, 0.1)
    OWN_SOLVERS[name](own, pairs)
    assert aligner.state_dict().keys() == own.state_dict().keys()
    for key, value in own.state_dict().items():
        assert torch.allclose(aligner.state_dict()[key], value), key
    assert any(not torch.equal(before[key], value) for key, value in aligner.state_dict().items())


def seeded(spec: str, pairs: Pairs) -> Aligner:
    torch.manual_seed(0)
    return fresh(spec, BETWEEN, pairs, lambda: pairs.sums)


def test_a_perceptron_by_class_starts_at_the_maps_of_the_classes():
    pairs = made_up(1)
    spec = "residual_mlp(neighbours=1, hidden=4, classes=True)"
    aligner, own = seeded(spec, pairs), seeded(spec, pairs)
    solve_into(aligner, pairs, 0.1)
    own.start_from_classes(pairs.classes, 0.1)
    assert all(torch.equal(aligner.state_dict()[key], value) for key, value in own.state_dict().items())


def test_a_projector_without_closed_form_gets_the_scales():
    pairs = made_up(1)
    aligner = seeded("elastic", pairs)
    solve_into(aligner, pairs, 0.1)
    mean = pairs.sums.y / pairs.sums.n
    assert torch.allclose(aligner.y_mean.double(), mean, atol=1e-5)


def test_what_has_neither_stays_as_it_is():
    pairs = made_up(1)
    aligner = fresh("zero_pad", BETWEEN, pairs, lambda: pairs.sums)
    solve_into(aligner, pairs, 0.1)
    assert not aligner.state_dict()


def test_a_rule_for_layers_becomes_layers():
    pairs = made_up(1)
    near = fresh("blockwise(sources=nearest_depth)", BETWEEN, pairs, unasked)
    assert [list(row) for row in near.sources] == [[0], [0], [1]]
    given = fresh("blockwise(sources=[[1], [0], [0, 1]])", BETWEEN, pairs, unasked)
    assert [list(row) for row in given.sources] == [[1], [0], [0, 1]]
    with pytest.raises(UnknownName, match="nearest_depth"):
        fresh("blockwise(sources=nearest_deph)", BETWEEN, pairs, unasked)


def unasked() -> Sums:
    raise AssertionError("only rules by error look at held-out sums")


def test_a_rule_by_error_measures_on_held_out_sums():
    """The receiver's layers are copies of the sender's layers 1, 0, 1; the training sums alone could not say so."""
    x, held = torch.randn(300, 8), torch.randn(300, 8)
    sums, held_out = (Sums.of(part, copied(part)) for part in (x, held))
    found = fresh("blockwise(sources='top_k_sources(k=1)')", BETWEEN, Pairs(1, [sums]), lambda: held_out)
    assert [list(row) for row in found.sources] == [[1], [0], [1]]
    both = fresh("procrustes(sources='top_k_sources(k=2)')", BETWEEN, Pairs(1, [sums]), lambda: held_out)
    assert [list(row) for row in both.sources] == [[0, 1]] * 3
    lied = Sums.of(held, copied(held.roll(4, 1)))
    other = fresh("blockwise(sources='top_k_sources(k=1)')", BETWEEN, Pairs(1, [sums]), lambda: lied)
    assert [list(row) for row in other.sources] != [[1], [0], [1]]


def copied(x: torch.Tensor) -> torch.Tensor:
    """Keys of two channels and values of one for each of three layers, in the order of `features.flatten`."""
    keys, values = x[:, :4].unflatten(1, (2, 2)), x[:, 4:].unflatten(1, (2, 2))
    layers = [1, 0, 1]
    return torch.cat([keys[:, layers].flatten(1), values[:, layers, 0]], 1)


def test_a_table_has_an_entry_for_each_token_text():
    assert fresh("token_table", BETWEEN, made_up(1), unasked).options() == {"n_tokens": 3}


def test_neighbours_are_those_of_the_spec_or_the_default():
    assert neighbours_of("linear") == 1
    assert neighbours_of("linear(neighbours=4)") == 4
    assert neighbours_of("residual_mlp") == 4
    assert neighbours_of("procrustes") == 1


# What is trained


def test_an_affine_map_is_trained_from_where_it_stands_and_given_back_as_one():
    pairs = made_up(2)
    linear = aligner_class("linear")(BETWEEN, neighbours=2)
    solve_into(linear, pairs, 0.1)
    kv = contract.cache(((1, 2, 2), (1, 2, 2)), n_tokens=5)
    module = trainable(linear, pairs)
    assert not isinstance(module, Aligner)
    finished = module.finish()
    assert isinstance(finished, Linear) and finished.options() == linear.options()
    for own in (module, finished):
        assert torch.allclose(flatten(own(kv)), flatten(linear(kv)), atol=1e-4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained = module.finish()
    assert torch.allclose(flatten(trained(kv)), flatten(module(kv)), atol=1e-3)
    assert not torch.allclose(trained.weight, linear.weight, atol=1e-2)


def test_wider_pairs_than_the_map_reads_are_narrowed():
    pairs = made_up(2)
    linear = aligner_class("linear")(BETWEEN, neighbours=1)
    solve_into(linear, pairs.narrowed(1), 0.1)
    finished = trainable(linear, pairs).finish()
    assert torch.allclose(finished.weight, linear.weight, atol=1e-4)


def test_a_perceptron_is_folded_and_others_are_kept():
    pairs = made_up(2)
    residual = seeded("residual_mlp(neighbours=2, hidden=4)", pairs)
    assert trainable(residual, pairs).finish().options()["folded"] is True
    classwise = seeded("classwise", made_up(1))
    module = trainable(classwise, pairs)
    assert module.finish() is classwise and {*module.parameters()} == {*classwise.parameters()}


def test_models_are_frozen_and_looked_at_afterwards(llama):
    weight = next(llama.hf.parameters())
    with frozen(llama):
        assert not any(parameter.requires_grad for parameter in llama.hf.parameters())
    assert all(parameter.requires_grad for parameter in llama.hf.parameters())
    kept = weight.detach().clone()
    with pytest.raises(ModelRefused, match="llama changed"), frozen(llama), torch.no_grad():
        weight.mul_(1.5)
    with torch.no_grad():
        weight.copy_(kept)
    with pytest.raises(ZeroDivisionError), frozen(llama):
        raise ZeroDivisionError
    assert weight.requires_grad


# Whole fits


@pytest.fixture(scope="module")
def same(llama, qwen) -> tuple[Fitted, list[Step]]:
    steps = []
    before = model_fingerprint(qwen.hf, qwen.geometry.layers)
    fitted = fit(llama, qwen, Short(), RECIPE, Watch(on_step=steps.append))
    assert model_fingerprint(qwen.hf, qwen.geometry.layers) == before
    return fitted, steps


@pytest.fixture(scope="module")
def other(llama, gemma) -> Fitted:
    """Another tokenizer, on its grid, by both losses."""
    recipe = replace(
        RECIPE,
        aligner="residual_mlp(neighbours=1, hidden=8, classes=True)",
        grid="receiver",
        losses={"answer": 1.0, "own_text": 0.5},
    )
    return fit(llama, gemma, Short(), recipe)


class Unread(Short):
    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        raise AssertionError("texts are read before the map was tried")


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("residual_mlp(hidden=0)", UsageError, "hidden is 0, out of range. Give at least 1"),
        ("narrow(rank=100000)", UsageError, "Give a rank of 1 to"),
        (
            "blockwise(sources='top_k_sources(k=99)')",
            BadSpec,
            r"k=99\) of 4 sender layers. Give a k of 1 to 4",
        ),
        (
            "procrustes(sources='nearest_depth(k=5)')",
            BadSpec,
            r"k=5\) of 4 sender layers. Give a k of 1 to 4",
        ),
        ("procrustes(sources=[[9]])", UsageError, "sources"),
    ],
)
def test_a_map_that_cannot_be_built_is_refused_before_texts_are_read(llama, qwen, spec, error, said):
    with pytest.raises(error, match=said):
        fit(llama, qwen, Unread(), replace(RECIPE, aligner=spec))


@pytest.mark.parametrize("spec", ["token_table", "blockwise(sources='top_k_sources(k=4)')", "random_map"])
def test_a_map_that_needs_pairs_can_be_tried_without(llama, qwen, spec):
    before = torch.random.get_rng_state()
    rehearse(spec, Contract(llama.geometry, qwen.geometry))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_contract_names_models_grid_codecs_and_stride(llama, qwen, gemma, same, other):
    fitted, steps = same
    found = fitted.aligner.contract
    assert (found.sender, found.receiver, found.grid) == (llama.geometry, qwen.geometry, "sender")
    assert found.coded_with == tuple(repr(CODECS.parse(codec)) for codec in CODECS_OF_RECIPE)
    assert found.stride == 1.0, "both have one tokenizer"
    assert [step.step for step in steps] == [0, 1, 2] and set(steps[0].parts) == {"answer"}
    assert other.aligner.contract.grid == "receiver"
    assert other.aligner.contract.receiver == gemma.geometry
    assert other.aligner.contract.stride == pytest.approx(1.0, abs=0.01), (
        "one slot for each of its own tokens"
    )
    assert other.aligner.options() == {"neighbours": 1, "hidden": 8, "folded": True, "classes": True}


@pytest.mark.parametrize("which", ["same", "other"])
def test_a_fit_lies_between_the_receivers_own_cache_and_what_knows_less(same, other, which):
    fitted = same[0] if which == "same" else other
    controls = {control.name: control for control in fitted.controls}
    own = controls.pop("the receiver's own cache")
    assert set(controls) == {
        "cut or padded with zeros",
        "another context",
        "mean cache",
        "mean entry",
        "token table",
    }
    assert own.accuracy > 0.9
    for found in (*fitted.scores, *fitted.closed_scores):
        assert own.loss < found.loss < min(control.loss for control in controls.values())
        low, high = found.loss_ci95
        assert low < found.nats.mean() < high


def test_a_fit_is_decided_by_its_seed(llama, qwen, gemma, same, other):
    changed = replace(RECIPE, loop=replace(RECIPE.loop, seed=1))
    assert not torch.equal(fit(llama, qwen, Short(), changed).aligner.weight, same[0].aligner.weight)
    again = fit(llama, gemma, Short(), other.material.recipe).aligner.state_dict()
    wanted = other.aligner.state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted), "also what starts at random"


def test_closed_forms_alone_are_a_fit(llama, qwen):
    recipe = replace(RECIPE, aligner="low_rank(rank=8)", loop=replace(RECIPE.loop, steps=0))
    fitted = fit(llama, qwen, Short(), recipe)
    assert fitted.trained is None and fitted.penalty in fitting.PENALTIES
    assert fitted.scores == fitted.closed_scores
    assert closed_form(fitted.material, "procrustes(sources=nearest_depth)")[1] is None


def test_the_card_says_how_it_was_made(same, other, tmp_path):
    for fitted, name in ((same[0], "linear"), (other, "residual_mlp")):
        report = report_fit(fitted, ("one", "two"), "kvferry fit ...")
        for word in (
            *fitted.aligner.contract.coded_with,
            f"{name} in closed form (penalty",
            "3 of 3 steps",
            "control: token table",
            "kvferry fit ...",
            f"{fitted.aligner.contract.stride:.4f} receiver tokens",
            fitted.material.digest[:16],
            "centred R2 of keys by layer",
            "answers right",
        ):
            assert word in report.card
        report.save(tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == report.card
        again = load_aligner(tmp_path / name)
        assert again.contract == fitted.aligner.contract and again.options() == fitted.aligner.options()


def test_what_was_fitted_answers_through_the_session(llama, qwen, same):
    receiver = Receiver(qwen, same[0].aligner)
    reply = receiver.answer(Sender(llama, "int(bits=8)").read("Ann has tea in Oslo."), "Where is the tea?")
    assert reply.stages_ms.keys() == {"decode", "align", "prefill", "generate"}


def test_another_context_ends_where_its_own_did(llama):
    own = Route(llama, llama).sent(
        ["Ann has tea.", "Bob has tea in Oslo. Ann has milk in Rome.", "Cal is here."]
    )
    other = other_contexts(own)
    before, after = (kv.present[0].sum(-1).tolist() for kv in (own, other))
    assert after == [min(before[row], before[row - 1]) for row in range(3)] and before[1] > before[0]
    assert torch.equal(other.layer(2)[0][1, :, : after[1]], own.layer(2)[0][0, :, : after[1]])
    assert (relay_layout(other, 1).next_position <= relay_layout(own, 1).next_position).all()


def test_a_perfect_cache_scores_as_the_receivers_own_reading(llama):
    """The scorer itself: the receiver's own cache must give nearly every answer, another's nearly none."""
    examples = [e for e in islice(Worlds().examples("test", 3), 48) if "How many" not in str(e.pieces)]
    own = Route(llama, llama).sent([example.context for example in examples])
    after = continuations(llama, examples)
    got = answer_scores(llama, own, after, 1.0)
    assert got.n_right / got.n_pieces > 0.9
    swapped = answer_scores(llama, other_contexts(own), after, 1.0)
    assert swapped.n_right / swapped.n_pieces < 0.5


def test_the_mean_cache_has_no_content(llama):
    examples = list(islice(Worlds().examples("dev", 0), 4))
    mean = mean_cache(Route(llama, llama).sent([example.context for example in examples]))
    keys = mean.layer(0)[0]
    assert torch.equal(keys[0, :, -1], keys[3, :, -2])


# Stopped, and gone on


class Stopped(Exception):
    pass


def stop(step: Step) -> None:
    if step.step == 1:
        raise Stopped


def test_a_fit_that_was_stopped_goes_on(llama, qwen, same, tmp_path):
    material = same[0].material
    start, _ = closed_form(material, RECIPE.aligner)
    with pytest.raises(Stopped):
        train(material, start, Watch(on_step=stop, folder=tmp_path))
    assert (tmp_path / NAME).exists()
    steps: list[Step] = []
    went_on = fit(llama, qwen, Short(), RECIPE, Watch(on_step=steps.append, folder=tmp_path))
    assert [step.step for step in steps] == [1, 2]
    assert torch.equal(went_on.aligner.weight, same[0].aligner.weight)


def in_place(material: Material, **changes: object) -> Material:
    return replace(material, recipe=replace(material.recipe, **changes))


OTHERS = {
    "aligner": lambda one: in_place(one, aligner="linear(neighbours=2)"),
    "losses": lambda one: in_place(one, losses={"answer": 2.0}),
    "codecs": lambda one: in_place(one, codecs=("raw(float16)",)),
    "rate": lambda one: in_place(one, loop=replace(RECIPE.loop, learning_rate=1e-3)),
    "texts": lambda one: replace(one, digest="0" * 64),
    "source": lambda one: replace(one, source=replace(one.source, source=Worlds())),
    "models": lambda one: replace(one, contract=replace(one.contract, sender=one.contract.receiver)),
}


@pytest.fixture(scope="module")
def checkpointed(same, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    train(same[0].material, closed_form(same[0].material, RECIPE.aligner)[0], Watch(folder=folder))
    return folder


@pytest.mark.parametrize("other_one", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_fit_is_refused(same, checkpointed, other_one):
    material = same[0].material
    start = Linear(material.contract)
    solve_into(start, material.pairs, 1e-2)
    with pytest.raises(UsageError, match="the checkpoint in"):
        train(other_one(material), start, Watch(folder=checkpointed))


def test_a_loss_that_is_no_number_stops_the_fit(same):
    material = in_place(same[0].material, loop=replace(RECIPE.loop, learning_rate=1e30, clip=float("inf")))
    with pytest.raises(TrainingDiverged, match=r"not finite|the loss is"):
        train(material, closed_form(material, RECIPE.aligner)[0], Watch())


# The command


def run(*words: str):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["fit", *words])


YAML = """
aligner: linear(neighbours=1)
codecs:
  - raw(float16)
  - int(bits=8)
data:
  texts: 6
  batch_size: 4
loop:
  steps: 2
  warmup: 1
"""


def test_the_command_fits_by_a_recipe(tmp_path):
    recipe, out, journal = tmp_path / "fit.yaml", tmp_path / "out", tmp_path / "journal.jsonl"
    recipe.write_text(YAML)
    words = ("--sender", "llama", "--receiver", "qwen3", "--recipe", str(recipe), "--out", str(out))
    done = run(*words, "--steps", "1", "--journal", str(journal), "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["out"] == str(out) and said["verdict"] == ""
    assert [row["name"] for row in said["scores"][:2]] == list(load_aligner(out).contract.coded_with)
    assert {"loss", "accuracy", "loss_ci95", "accuracy_ci95"} <= said["scores"][-1].keys()
    assert len(journal.read_text().splitlines()) >= 1, "what is given beside a recipe wins: one step"
    card = (out / "README.md").read_text()
    assert "1 of 1 steps" in card and "--sender llama --receiver qwen3" in card


REFUSED = {
    "unknown key": (f"{YAML}gird: receiver\n", (), "Did you mean 'grid'?"),
    "unknown aligner": (None, ("--aligner", "liner"), "Did you mean 'linear'?"),
    "unknown codec": (None, ("--codecs", "raw; itn(bits=8)"), "Did you mean 'int'?"),
    "no texts": (None, ("--texts", "0"), "out of range"),
    "a cap for nothing": (None, ("--max-mb", "1"), "--max-mb without --auto"),
    "a rate of zero": (None, ("--learning-rate", "0"), "out of range"),
    "a negative number of steps": (None, ("--steps", "-1"), "out of range"),
    "no contexts in a step": (None, ("--batch-size", "0"), "out of range"),
}


@pytest.mark.parametrize(("yaml", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_calls_that_cannot_be_carried_out(tmp_path, yaml, words, said):
    if yaml is not None:
        (tmp_path / "fit.yaml").write_text(yaml)
        words = ("--recipe", str(tmp_path / "fit.yaml"))
    done = run("--out", str(tmp_path / "out"), *words)
    assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "out").exists()
