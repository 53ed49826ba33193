"""Losses between caches in a recipe: against `over_cache` by hand, in pieces as in one, in a training."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from kvferry.align.contract import Contract
from kvferry.align.linear import Linear
from kvferry.errors import BadSpec, UnknownName, UsageError
from kvferry.kv import KV, Group
from kvferry.models.capture import capture_rotated
from kvferry.models.load import load
from kvferry.models.scores import scores_of
from kvferry.models.tokens import join
from kvferry.train.answer_loss import continuations, full_text_kl, full_text_logits
from kvferry.train.examples import Example, Worlds
from kvferry.train.fit import Watch, frozen, prepare, train
from kvferry.train.loop import Step
from kvferry.train.losses import LOSSES
from kvferry.train.losses.base import Aids, Reads, over_cache
from kvferry.train.losses.moments import moments_of
from kvferry.train.objective import Objective
from kvferry.train.recipe import DataRecipe, FitRecipe, load_recipe
from kvferry.train.route import Route

EXAMPLES = list(islice(Worlds().examples("dev", 0), 3))
ENTRY = ["whitened_mse", "cosine(whiten=head)", "mercator(beta=0.1)", "three_term"]
MIX = {"own_text": 1.0, "whitened_mse": 0.1, "hybrid(schedule=cosine, steps=300)": 0.2, "structural": 0.5}


@pytest.fixture(scope="module", params=["llama to qwen3", "llama to gemma3"])
def route(request) -> Route:
    """One tokenizer, or two on the receiver's grid: either way a slot for each of the receiver's tokens."""
    sender, receiver = request.param.split(" to ")
    return Route(load(sender), load(receiver), "sender" if receiver == "qwen3" else "receiver")


@pytest.fixture
def aligner(route) -> Linear:
    torch.manual_seed(0)
    found = Linear(Contract(route.sender.geometry, route.receiver.geometry, grid=route.grid))
    torch.nn.init.normal_(found.weight, std=0.05)
    return found


def contexts(examples: Sequence[Example] = EXAMPLES) -> list[str]:
    return [example.context for example in examples]


@pytest.fixture(scope="module")
def objective(route) -> Callable[[dict[str, float]], Objective]:
    """By its weights; moments are made once."""
    moments = moments_of([route.held(contexts())])
    return lambda weights: Objective(route.receiver, weights, 1.0, moments)


def moved(kv: KV, by: float) -> KV:
    generator = torch.Generator().manual_seed(1)
    groups = [
        Group(group.layers, *(part + by * torch.randn(part.shape, generator=generator) for part in parts))
        for group in kv.groups
        for parts in [(group.keys, group.values)]
    ]
    return kv.with_groups(tuple(groups))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)


# What is summed


@pytest.mark.parametrize("spec", ENTRY)
@torch.no_grad()
def test_a_loss_is_that_of_each_example_by_its_scored_tokens(route, objective, aligner, spec):
    model, mapped, held = route.receiver, aligner(route.sent(contexts())), route.held(contexts())
    moments, total, n = moments_of([held]), 0.0, 0
    for row, example in enumerate(EXAMPLES):
        after = continuations(model, [example])
        own_text = full_text_logits(model, [example.context], after)
        aids = Aids(moments, task=lambda kv, a=after, o=own_text: full_text_kl(model, kv, a, 1.0, o).loss)
        [one, own] = (next(kv.take_batch([row]).sequences()) for kv in (mapped, held))
        value, _ = over_cache(LOSSES.parse(spec), one, own, aids)
        n_scored = int(after.scored[:, 1:].sum())
        total, n = total + value * n_scored, n + n_scored
    got = objective({spec: 2.0})(mapped, EXAMPLES)
    assert got.n == n
    close(got.total, 2 * total)
    close(got.parts[spec], total)


@torch.no_grad()
def test_reads_are_those_of_the_receivers_own_reading(route, objective):
    """Queries as the model made them behind the text, against queries that were turned to behind the slots."""
    model, [example] = route.receiver, EXAMPLES[:1]
    held = Route(model, model).held([example.context])
    after = continuations(model, [example])
    n_new = after.tokens.ids.shape[1]
    read = capture_rotated(model, join(model.contexts([example.context]), after.tokens), ("queries_rotated",))
    queries = tuple(layer[:, :, -n_new:] for layer in read.evidence.queries_rotated)
    positions = read.kv.positions[0, :, -n_new:]
    reads = Reads(queries, positions, torch.ones_like(positions, dtype=torch.bool), scores_of(model))
    n_head = model.head.ids.shape[1]
    mapped, own = (replace(kv, positions=kv.positions + n_head) for kv in (moved(held, 0.3), held))
    want, told = over_cache(LOSSES.parse("structural"), mapped, own, Aids(reads=reads))
    got = objective({"structural": 1.0})(moved(held, 0.3), [example])
    assert want > 1e-3
    close(got.total / got.n, want)
    close(got.parts["structural/attention_kl"] / got.n, told["attention_kl"])


@torch.no_grad()
def test_a_mix_is_the_weighted_sum_of_its_terms(route, objective, aligner):
    mapped = aligner(route.sent(contexts()))
    got = objective(MIX)(mapped, EXAMPLES, 150)
    close(got.total, sum(weight * got.parts[name] for name, weight in MIX.items()))
    alone = objective({"structural": 0.5})(mapped, EXAMPLES, 150)
    close(alone.total, 0.5 * got.parts["structural"])
    assert "structural/output_error" in got.parts and "whitened_mse/mse" in got.parts


@torch.no_grad()
def test_a_schedule_goes_by_the_step(route, objective, aligner):
    mapped, spec = aligner(route.sent(contexts())), "hybrid(schedule=linear, steps=10)"
    on_the_way = objective({spec: 1.0})
    for step, plain in ((0, "whitened_mse"), (5, LOSSES.parse(spec).at(5).brief())):
        close(on_the_way(mapped, EXAMPLES, step).total, objective({plain: 1.0})(mapped, EXAMPLES).total)


@torch.no_grad()
def test_own_caches_lose_nothing_and_those_of_other_texts_do(route, objective):
    held = route.held(contexts())
    weights = dict.fromkeys((*ENTRY, "structural"), 1.0)
    same, other = (objective(weights)(kv, EXAMPLES) for kv in (held, held.take_batch([1, 2, 0])))
    for spec in weights:
        assert abs(float(same.parts[spec])) / same.n < 1e-5
        assert float(other.parts[spec]) / other.n > 0.01


@torch.no_grad()
def test_a_slot_without_a_partner_counts_nowhere(route, objective):
    """Its bytes lie behind the text, where the receiver has no token, and it holds no numbers at all."""
    held = route.held(contexts())
    held = held.take_tokens(torch.arange(held.n_tokens - 1))
    weights = {"whitened_mse": 1.0, "structural": 1.0}
    want = objective(weights)(replace(held, present=without_last(held)), EXAMPLES)
    spans = tuple(
        replace(row, **{name: beyond(getattr(row, name)) for name in ("start", "end")}) for row in held.spans
    )
    groups = tuple(Group(group.layers, *map(poisoned, (group.keys, group.values))) for group in held.groups)
    got = objective(weights)(replace(held, spans=spans, groups=groups), EXAMPLES)
    close(got.parts["whitened_mse"], want.parts["whitened_mse"])
    assert got.total.isfinite()


def without_last(kv: KV) -> torch.Tensor:
    present = kv.present.clone()
    present[..., -1] = False
    return present


def beyond(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([numbers[:-1], numbers[-1:] + 10_000])


def poisoned(part: torch.Tensor) -> torch.Tensor:
    return torch.cat([part[..., :-1, :], torch.full_like(part[..., -1:, :], torch.nan)], -2)


# Pieces, gradients, passes


def gradient(
    route: Route, objective, aligner: Linear, pieces: Sequence[Sequence[Example]]
) -> list[torch.Tensor]:
    weights = {"answer": 1.0, "cosine": 0.5, "three_term": 0.5}
    aligner.zero_grad()
    found = [objective(weights)(aligner(route.sent(contexts(piece))), piece) for piece in pieces]
    sum(loss.total for loss in found).backward()
    n = sum(loss.n for loss in found)
    return [parameter.grad / n for parameter in aligner.parameters()]


def test_pieces_of_a_batch_give_the_gradient_of_the_batch(route, objective, aligner):
    """Contexts of different lengths: a mean over the slots of a piece would be another gradient."""
    longest = replace(EXAMPLES[0], context=" ".join(contexts()))
    batch = [longest, *EXAMPLES[1:]]
    whole = gradient(route, objective, aligner, [batch])
    for one, other in zip(whole, gradient(route, objective, aligner, [batch[:1], batch[1:]]), strict=True):
        assert one.isfinite().all() and one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_the_gradient_of_reads_reaches_the_map(route, objective, aligner):
    objective({"structural": 1.0})(aligner(route.sent(contexts())), EXAMPLES).total.backward()
    for parameter in aligner.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("names", "n_passes"),
    [
        (["whitened_mse", "structural"], 0),
        (["answer", "mercator"], 1),
        (["answer", "own_text", "three_term"], 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_receiver_predicts_no_more_than_is_asked_for(route, objective, aligner, names, n_passes):
    """Reading a text for its cache alone has no prediction; `own_text` and tasks share two."""
    mapped, wanted = aligner(route.sent(contexts())), objective(dict.fromkeys(names, 1.0))
    seen = []
    hook = route.receiver.hf.register_forward_hook(lambda *_: seen.append(1))
    wanted(mapped, EXAMPLES)
    hook.remove()
    assert len(seen) == n_passes


def test_autocast_does_not_round_what_is_aimed_at(route, objective):
    held = route.held(contexts())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective({"whitened_mse": 1.0})(held, EXAMPLES)
    assert float(loss.total) / loss.n < 1e-8


# Moments


def test_moments_are_of_all_texts_however_many_are_read_at_once(route):
    examples = list(islice(Worlds().examples("train", 0), 33))
    got = Objective.prepared(route.receiver, {"whitened_mse": 1.0}, 1.0, examples).moments
    want = moments_of([route.held(contexts(examples))])
    for pairs, others in zip(got.groups, want.groups, strict=True):
        for one, other in zip(pairs, others, strict=True):
            close(one.mean, other.mean)
            close(one.variance, other.variance)


def test_moments_are_made_only_where_they_are_needed(route, aligner):
    weights = {"answer": 1.0, "cosine": 1.0, "structural": 1.0}
    assert Objective.prepared(route.receiver, weights, 1.0, EXAMPLES).moments is None
    with pytest.raises(UsageError, match="whitened_mse needs moments"):
        Objective(route.receiver, {"whitened_mse": 1.0}, 1.0)(aligner(route.sent(contexts())), EXAMPLES)


# Recipes


YAML = """
aligner: linear(neighbours=1)
codecs:
  - raw(float16)
losses:
  own_text: 1.0
  whitened_mse: 0.1
  hybrid(schedule=cosine, steps=300): 0.2
  "structural": 0.5
"""


def test_losses_are_named_by_their_specs(tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text(YAML)
    assert load_recipe(path).losses == MIX


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("structual", UnknownName, "Did you mean 'structural'"),
        ("own_txt", UnknownName, "Did you mean 'own_text'"),
        ("hybrid(step=3)", UnknownName, "Did you mean 'steps'"),
        ("hybrid(steps=0)", BadSpec, "at least 1"),
        ("mercator(beta=-1.0)", BadSpec, "at least 0"),
        ("answer(2)", BadSpec, "Write answer alone"),
        ("cosine(", BadSpec, "cannot read the spec"),
    ],
)
def test_what_is_no_loss_is_named_with_its_line(tmp_path, spec, error, said):
    path = tmp_path / "fit.yaml"
    path.write_text(YAML.replace("whitened_mse", f"'{spec}'"))
    with pytest.raises(error, match="line 7 of") as found:
        load_recipe(path)
    assert said in str(found.value)
    with pytest.raises(error):
        FitRecipe("linear", ("raw",), losses={spec: 1.0})


def test_a_fit_trains_on_a_mix():
    """Every part is told, and the scheduled loss has the weights of its step."""
    hybrid = "hybrid(schedule=linear, steps=4)"
    weights = {"own_text": 1.0, "whitened_mse": 0.1, hybrid: 0.2, "structural": 0.5}
    recipe = FitRecipe("linear(1)", ("raw",), DataRecipe(texts=16, batch_size=4), losses=weights)
    recipe = replace(recipe, loop=replace(recipe.loop, steps=3, accumulate=2))
    steps: list[Step] = []
    sender, receiver = load("llama"), load("qwen3")
    with frozen(sender), frozen(receiver):
        material = prepare(Route(sender, receiver), Worlds(), recipe)
        train(material, Linear(material.contract, 1), Watch(on_step=steps.append))
    assert [step.step for step in steps] == [0, 1, 2]
    for step in steps:
        told, now = step.parts, LOSSES.parse(hybrid).at(step.step)
        assert step.loss == pytest.approx(
            sum(weight * told[name] for name, weight in weights.items()), rel=1e-4
        )
        mercator = told[f"{hybrid}/dir_loss"] + now.beta * told[f"{hybrid}/mag_loss"]
        want = now.mercator_weight * mercator + now.mse_weight * told[f"{hybrid}/mse"]
        assert told[hybrid] == pytest.approx(want, rel=1e-4)
