"""Losses behind a mapped cache: against the scorer, against the receiver's own reading, in pieces as in one."""

from itertools import islice

import pytest
import torch

from kvferry.align.contract import Contract
from kvferry.align.linear import Linear
from kvferry.errors import UnknownName
from kvferry.models.load import load
from kvferry.models.relay import take_over
from kvferry.train.answer_loss import answer_scores, continuations
from kvferry.train.examples import Worlds
from kvferry.train.loop import Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.objective import TERMS, Objective
from kvferry.train.route import Route

EXAMPLES = list(islice(Worlds().examples("dev", 0), 6))
CONTEXTS = [example.context for example in EXAMPLES]


@pytest.fixture(scope="module")
def route() -> Route:
    return Route(load("llama"), load("gemma3"))


@pytest.fixture
def aligner(route) -> Linear:
    found = Linear(Contract(route.sender.geometry, route.receiver.geometry, stride=1.2))
    torch.nn.init.normal_(found.weight, std=0.02)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_the_receivers_own_cache_diverges_from_nothing(name):
    model = load(name)
    own = Route(model, model).sent(CONTEXTS)
    loss = Objective(model, {"own_text": 1.0}, 1.0)(own, EXAMPLES)
    assert abs(float(loss.total)) / loss.n <= 1e-5
    other = Objective(model, {"own_text": 1.0}, 1.0)(own.take_batch([5, 0, 1, 2, 3, 4]), EXAMPLES)
    assert float(other.total) / other.n > 0.5


def test_the_answer_term_is_what_the_scorer_says(route, aligner):
    mapped = aligner(route.sent(CONTEXTS))
    after = continuations(route.receiver, EXAMPLES)
    wanted = answer_scores(route.receiver, mapped, after, 1.2)
    got = Objective(route.receiver, {"answer": 1.0}, 1.2)(mapped, EXAMPLES)
    assert got.n == wanted.n_tokens
    assert torch.allclose(got.total, wanted.nats, rtol=1e-5)
    assert torch.equal(got.parts["answer"], got.total)


def test_terms_are_weighted_and_told_apart(route, aligner):
    mapped = aligner(route.sent(CONTEXTS))
    loss = Objective(route.receiver, {"answer": 0.5, "own_text": 2.0}, 1.2)(mapped, EXAMPLES)
    assert set(loss.parts) == set(TERMS)
    assert torch.allclose(loss.total, 0.5 * loss.parts["answer"] + 2 * loss.parts["own_text"])
    alone = Objective(route.receiver, {"own_text": 1.0}, 1.2)(mapped, EXAMPLES)
    assert torch.allclose(alone.total, loss.parts["own_text"], rtol=1e-5)


def test_the_divergence_is_cross_entropy_less_entropy(route, aligner):
    """KL(own || mapped) over every token that could come, by hand from both predictions."""
    model, mapped = route.receiver, aligner(route.sent(CONTEXTS))
    own = Route(model, model).sent(CONTEXTS)
    after = continuations(model, EXAMPLES)
    scored = after.scored[:, 1:]
    with torch.no_grad():
        p, q = (
            take_over(model, kv, stride, after.tokens, keep=0)[1][:, :-1][scored].double().softmax(-1)
            for kv, stride in ((own, 1.0), (mapped, 1.2))
        )
    wanted = (p * (p.log() - q.log())).sum()
    got = Objective(model, {"own_text": 1.0}, 1.2)(mapped, EXAMPLES).total
    assert torch.allclose(got.double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_reaches_the_map_and_nothing_else(route, aligner, term):
    for model in (route.sender, route.receiver):
        model.hf.requires_grad_(False)
    loss = Objective(route.receiver, {term: 1.0}, 1.2)(aligner(route.sent(CONTEXTS)), EXAMPLES)
    loss.total.backward()
    for parameter in aligner.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    for model in (route.sender, route.receiver):
        assert all(parameter.grad is None for parameter in model.hf.parameters())


@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_of_a_batch_give_the_gradient_of_the_batch(route, aligner, pieces):
    """Contexts and answers of different lengths, so that a mean of means would be another gradient."""
    start = {name: value.clone() for name, value in aligner.state_dict().items()}
    whole, norm = gradient(route, aligner, 1)
    aligner.load_state_dict(start)
    got, other_norm = gradient(route, aligner, pieces)
    assert norm == pytest.approx(other_norm, rel=1e-4)
    scale = max(part.abs().max() for part in whole)
    for one, other in zip(whole, got, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(scale), rtol=1e-4)


def gradient(route: Route, aligner: Linear, pieces: int) -> tuple[list[torch.Tensor], float]:
    objective = Objective(route.receiver, {"answer": 1.0, "own_text": 1.0}, 1.2)
    norms = []
    trainer = Trainer(
        aligner,
        lambda step, rows: objective(aligner(route.sent([row.context for row in rows])), rows),
        lambda start: iter(lambda: EXAMPLES, None),
        LoopRecipe(steps=1, accumulate=pieces, clip=float("inf")),
        on_step=lambda step: norms.append(step.gradient_norm),
    )
    trainer.run()
    return [parameter.grad.clone() for parameter in aligner.parameters()], norms[0]


def test_a_term_that_does_not_exist_is_refused(route):
    with pytest.raises(UnknownName, match="answer"):
        Objective(route.receiver, {"anwser": 1.0}, 1.0)
