"""A map between two members of the zoo under two caps: a megabyte on disk, two minutes on one core.

What makes it quick: texts of the very kind that is asked about, a closed form to start from, and one grid, that of the
receiver, where the tokenizers differ. All pairs are fitted by one recipe; nothing in it names a model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice

import torch
from jaxtyping import Float64
from torch import Tensor

from kvferry.align.contract import Contract
from kvferry.align.features import flatten
from kvferry.align.narrow import NarrowMLP
from kvferry.align.ridge import Sums
from kvferry.align.runs import in_runs
from kvferry.codec import CODECS, Codec, roundtrip
from kvferry.errors import ModelRefused
from kvferry.kv import Geometry, Group
from kvferry.lab.arms import INT8, RAW
from kvferry.models.load import Model
from kvferry.train.examples import Batches, Example, Places
from kvferry.train.fit import frozen
from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.objective import Objective
from kvferry.train.paired import batches, targets
from kvferry.train.route import Route

_READ_AT_ONCE = 32
_N_SENSED = 6
"""Batches whose gradients say what matters."""


@dataclass(frozen=True)
class PairRecipe:
    """One recipe for every pair. The largest rank is taken that `max_mb` allows."""

    max_mb: float = 1.0
    neighbours: int = 4
    places: int = 6
    """Places in a run that are told apart where a token of the sender's spans several of the receiver's."""
    seen: int = 512
    """Directions that training may turn to, of all that a slot and its neighbours have."""
    n_texts: int = 384
    penalty: float = 1e-5
    batch_size: int = 8
    n_questions_in_runs: int = 5
    """Of each context, where a receiver reads in runs: its tokens are short, so a question takes long."""
    codecs: tuple[str, ...] = (RAW, INT8)
    loop: LoopRecipe = field(default_factory=lambda: LoopRecipe(steps=400, learning_rate=2e-3, warmup=20))


@dataclass(frozen=True)
class Fitted:
    """A map as it is stored, and what it cost: processor seconds with the closed form, without any scoring."""

    aligner: NarrowMLP
    cpu_seconds: float

    @property
    def mb(self) -> float:
        return sum(tensor.nbytes for tensor in self.aligner.state_dict().values()) / 1e6


def route_of(sender: Model, receiver: Model) -> Route:
    """With one tokenizer both grids are the same."""
    alike = sender.geometry.tokenizer == receiver.geometry.tokenizer
    return Route(sender, receiver, "sender" if alike else "receiver")


def fit_pair(route: Route, recipe: PairRecipe) -> Fitted:
    """Closed form, training by the receiver's answers, factors in fp16. Raises what `Trainer.run` raises."""
    start = time.process_time()
    with frozen(route.sender), frozen(route.receiver):
        aligner = _start(route, recipe)
        _train(route, recipe, aligner)
    return Fitted(aligner.fold().eval(), time.process_time() - start)


def _start(route: Route, recipe: PairRecipe) -> NarrowMLP:
    codecs = [CODECS.parse(spec) for spec in recipe.codecs]
    texts = [example.context for example in islice(Places().examples("train", 0), recipe.n_texts)]
    stride = _stride(route, texts[:_READ_AT_ONCE])
    n_places = recipe.places if stride > 2 else 1
    sender, receiver = route.sender.geometry, route.receiver.geometry
    coded_with = tuple(repr(codec.agreed()) for codec in codecs)
    on_grid = stride if route.grid == "sender" else 1.0
    contract = Contract(sender, receiver, route.grid, coded_with, on_grid)
    sums = sums_of(route, texts, codecs, recipe.neighbours, n_places)
    full = NarrowMLP(contract, len(sums[0].x), recipe.neighbours, n_places)
    full.start_from(sums, recipe.penalty)
    rank = rank_within(recipe.max_mb, sender, receiver, recipe.neighbours, n_places)
    shares = torch.tensor([one.n for one in sums])
    seen = min(recipe.seen, len(sums[0].x))
    return full.cut(rank, seen, shares / shares.sum(), _sensitivity(route, recipe, full))


def _sensitivity(route: Route, recipe: PairRecipe, aligner: NarrowMLP) -> Float64[Tensor, "out out"]:
    """Second moments of the answer loss's gradient by what an aligner makes: what a smaller one must keep."""
    objective = Objective(route.receiver, {"answer": 1.0}, aligner.contract.stride)
    found = torch.zeros(2 * (aligner.contract.receiver.floats_per_token,), dtype=torch.float64)
    for rows in islice(Batches(Places(), "train", 2, recipe.batch_size)(0), _N_SENSED):
        with torch.no_grad():
            made = aligner(route.sent([row.context for row in rows]))
        for group in made.groups:
            group.keys.requires_grad_(True)
            group.values.requires_grad_(True)
        objective(made, rows).total.backward()
        slopes = made.with_groups(tuple(map(_slopes, made.groups)))
        gradient = flatten(slopes)[made.present[0]].double()
        found += gradient.T @ gradient
    return found


def _slopes(group: Group) -> Group:
    """The gradients in the place of what they are of."""
    keys, values = group.keys.grad, group.values.grad
    if keys is None or values is None:
        raise ModelRefused("the receiver does not read its cache", cure="Fit for a model that attends to it")
    return Group(group.layers, keys, values)


def _stride(route: Route, texts: Sequence[str]) -> float:
    """Tokens of the receiver's for one of the sender's."""
    held = route.held(texts)
    sent = Route(route.sender, route.receiver).sent(texts)
    return float(held.present[0].sum() / sent.present[0].sum())


def rank_within(max_mb: float, sender: Geometry, receiver: Geometry, neighbours: int, places: int) -> int:
    """The largest rank of a folded map of at most `max_mb`: factors take two bytes a number, offsets four.

    >>> from kvferry.models.load import load
    >>> geometry = load("llama").geometry
    >>> rank_within(1.0, geometry, geometry, neighbours=4, places=1)
    216
    """
    n_in, n_out = neighbours * sender.floats_per_token, receiver.floats_per_token
    room = max_mb * 1e6 - 4 * places * n_out
    return min(int(room / (2 * n_in + 2 * (places + 1) * n_out + 4 * places)), n_in)


def sums_of(
    route: Route, texts: Sequence[str], codecs: Sequence[Codec], neighbours: int, places: int
) -> list[Sums]:
    """Sums over token pairs for each place in a run, through each codec in turn."""
    found: list[Sums] = []
    for batch, codec in zip(batches(texts, _READ_AT_ONCE), cycle(codecs), strict=False):
        sent, held = route.sent(batch), route.held(batch)
        entries, paired = targets(sent, held)
        wide, place = in_runs(roundtrip(codec, sent), neighbours, places)
        which = [paired & (place == index) for index in range(places)]
        more = [Sums.of(wide[here].cpu(), entries[here].cpu()) for here in which]
        found = [a + b for a, b in zip(found, more, strict=True)] if found else more
    return found


def _train(route: Route, recipe: PairRecipe, aligner: NarrowMLP) -> None:
    codecs = [CODECS.parse(spec) for spec in recipe.codecs]
    objective = Objective(route.receiver, {"answer": 1.0}, aligner.contract.stride)
    asked = Places() if aligner.places == 1 else Places(n_questions=recipe.n_questions_in_runs)
    drawn = Batches(asked, "train", 1, recipe.batch_size)
    Trainer(aligner, partial(_loss, route, codecs, aligner, objective), drawn, recipe.loop).run()


def _loss(
    route: Route,
    codecs: Sequence[Codec],
    aligner: NarrowMLP,
    objective: Objective,
    step: int,
    rows: Sequence[Example],
) -> Loss:
    """Through each codec in turn."""
    sent = route.sent([row.context for row in rows])
    return objective(aligner(roundtrip(codecs[step % len(codecs)], sent)), rows)
