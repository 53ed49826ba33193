"""A hub of some models, which another joins by fitting only its own two halves.

Codes stand on the tokens of whoever receives. Founders start in closed form and are trained through each other's
answers; then they are frozen, and the newcomer's halves are fitted in the same way. Nothing names a model: a receiver
whose tokens are much shorter than those of others (bytes) tells its places in a run apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from kvferry.align.contract import Contract
from kvferry.align.hub import Hub, found
from kvferry.align.hub_pair import HubPair
from kvferry.align.penalised import penalised
from kvferry.align.ridge import Sums, standardise
from kvferry.align.runs import in_runs
from kvferry.align.whitening import whitening
from kvferry.codec import CODECS, roundtrip
from kvferry.lab.arms import INT8, RAW
from kvferry.lab.pairs_fit import route_of
from kvferry.models.load import Model
from kvferry.train.examples import Batches, Example, Places
from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.objective import Objective
from kvferry.train.paired import batches
from kvferry.train.route import Route

CODED_WITH = (RAW, INT8)
_READ_AT_ONCE = 32
_SHORT = 2.0
"""Tokens of a model for each one of the first founder from which on it reads in runs."""
Ways = Sequence[tuple[Model, Model]]


@dataclass(frozen=True)
class HubRecipe:
    """How wide codes are, what is seen of a text, and what is spent on founding and joining."""

    dim: int = 256
    neighbours: int = 4
    places: int = 6
    """Places in a run that a receiver of short tokens tells apart."""
    seen: int = 512
    """Directions that training may turn to, of all that a token and its neighbours have."""
    penalty: float = 1e-4
    n_texts: int = 256
    batch_size: int = 8
    n_questions: int = 4
    """Of each context."""
    founding: LoopRecipe = field(
        default_factory=lambda: LoopRecipe(steps=1500, learning_rate=3e-4, warmup=40)
    )
    joining: LoopRecipe = field(default_factory=lambda: LoopRecipe(steps=900, learning_rate=4e-4, warmup=40))


def founded(founders: Sequence[Model], recipe: HubRecipe) -> Hub:
    """A hub in closed form, about the directions that its founders share on the tokens of the first; then trained."""
    first = founders[0]
    sums = _total(
        Sums.of(side_by_side, side_by_side)
        for texts in batches(_texts(recipe), _READ_AT_ONCE)
        for side_by_side in [torch.cat([_read(model, first, texts, 1, 1)[0] for model in founders], -1)]
    )
    geometries = {model.name: model.geometry for model in founders}
    space, hub = found(geometries, sums, recipe.dim, recipe.penalty), Hub(recipe.dim)
    for model in founders:
        _join(hub, model, space, founders, recipe)
    _train(hub, founders, founders, list(permutations(founders, 2)), recipe, recipe.founding)
    return hub


def join(hub: Hub, newcomer: Model, founders: Sequence[Model], recipe: HubRecipe) -> None:
    """Fit the newcomer's halves, in closed form and by answers; nothing else of the hub changes."""
    _join(hub, newcomer, hub, founders, recipe)
    hub.train_only(newcomer.name)
    _train(hub, [newcomer], founders, both_ways(newcomer, founders), recipe, recipe.joining)


@torch.no_grad()
def _join(hub: Hub, model: Model, space: Hub, founders: Sequence[Model], recipe: HubRecipe) -> None:
    """In closed form, from the codes that the founders have in a space, on its grid and on that of the first."""
    first, n_places = founders[0], _places(model, founders[0], recipe)
    sent, held = [], []
    for texts in batches(_texts(recipe), _READ_AT_ONCE):
        wide, _ = _read(model, first, texts, recipe.neighbours, 1)
        own, _ = _read(model, model, texts, 1, 1)
        codes = [_codes(space, founder, first, texts, 1)[0] for founder in founders]
        sent.append(Sums.of(wide, torch.stack(codes).mean(0)))
        for founder in founders:
            if founder is not model:
                theirs, place = _codes(space, founder, model, texts, n_places)
                held.append([Sums.of(theirs[place == at], own[place == at]) for at in range(n_places)])
    by_place = [_total(column) for column in zip(*held, strict=True)]
    hub.join(model.name, model.geometry, _total(sent), by_place, recipe.penalty)


def _codes(
    space: Hub, founder: Model, onto: Model, texts: Sequence[str], places: int
) -> tuple[Float[Tensor, "tokens code"], Int[Tensor, " tokens"]]:
    """What a founder says of each token of another model, and the token's place in its run."""
    wide, place = _read(founder, onto, texts, space.member(founder.name).neighbours, places)
    return space.encode(founder.name, wide), place


def _places(model: Model, first: Model, recipe: HubRecipe) -> int:
    texts = _texts(recipe)[:_READ_AT_ONCE]
    own, theirs = (Route(one, one).held(texts).present[0].sum() for one in (model, first))
    return recipe.places if float(own) > _SHORT * float(theirs) else 1


def both_ways(newcomer: Model, founders: Sequence[Model]) -> Ways:
    return [*((founder, newcomer) for founder in founders), *((newcomer, founder) for founder in founders)]


def _texts(recipe: HubRecipe) -> list[str]:
    examples = Places(n_questions=recipe.n_questions).examples("train", 0)
    return [example.context for example in islice(examples, recipe.n_texts)]


def _total(sums: Iterator[Sums] | Sequence[Sums]) -> Sums:
    first, *others = sums
    return sum(others, first)


def _read(
    model: Model, onto: Model, texts: Sequence[str], neighbours: int, places: int
) -> tuple[Float[Tensor, "tokens wide"], Int[Tensor, " tokens"]]:
    """What a model holds of each token of another one, with those before it, and the token's place in its run."""
    wide, place = in_runs(Route(model, onto, "receiver").sent(texts), neighbours, places)
    there = Route(onto, onto).sent(texts).present[0]
    return wide[there].cpu(), place[there].cpu()


def pair_between(hub: Hub, way: tuple[Model, Model]) -> HubPair:
    """The map between two members, with the hub's own halves: what trains it trains them."""
    sender, receiver = way
    source, target = hub.member(sender.name), hub.member(receiver.name)
    coded_with = tuple(repr(CODECS.parse(codec).agreed()) for codec in CODED_WITH)
    contract = Contract(sender.geometry, receiver.geometry, route_of(*way).grid, coded_with)
    pair = HubPair(contract, hub.dim, source.neighbours, target.places)
    pair.encoder, pair.decoder = source.encoder, target.decoder
    return pair


def _train(
    hub: Hub,
    members: Sequence[Model],
    founders: Sequence[Model],
    ways: Ways,
    recipe: HubRecipe,
    loop: LoopRecipe,
) -> None:
    """Each way in turn, through each codec in turn; the members' encoders in coordinates of their own."""
    if not loop.steps:
        return
    codecs = [CODECS.parse(codec) for codec in CODED_WITH]

    def loss(step: int, rows: Sequence[Example]) -> Loss:
        way, codec = ways[step % len(ways)], codecs[step // len(ways) % len(codecs)]
        sent = roundtrip(codec, route_of(*way).sent([row.context for row in rows]))
        return Objective(way[1], {"answer": 1.0}, 1.0)(pair_between(hub, way)(sent), rows)

    encoders = [hub.member(model.name).encoder for model in members]
    for model, encoder in zip(members, encoders, strict=True):
        register_parametrization(encoder, "weight", _turned(model, founders, recipe))
    drawn = Batches(Places(n_questions=recipe.n_questions), "train", 1, recipe.batch_size)
    Trainer(hub, loss, drawn, loop).run()
    for encoder in encoders:
        remove_parametrizations(encoder, "weight")


class _Turned(nn.Module):
    """Weights of standardised features, from those of a few whitened directions: steps in the former crawl."""

    basis: Tensor
    back: Tensor

    def __init__(self, basis: Float[Tensor, "features seen"], back: Float[Tensor, "seen features"]) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.register_buffer("back", back)

    def forward(self, weight: Float[Tensor, "seen code"]) -> Float[Tensor, "features code"]:
        return self.basis @ weight

    def right_inverse(self, weight: Float[Tensor, "features code"]) -> Float[Tensor, "seen code"]:
        return self.back @ weight


@torch.no_grad()
def _turned(model: Model, founders: Sequence[Model], recipe: HubRecipe) -> _Turned:
    """The whitened directions that tell most of what the (other) founders hold of the same tokens."""
    first, others = founders[0], [founder for founder in founders if founder is not model]
    std = standardise(
        _total(
            Sums.of(
                _read(model, first, texts, recipe.neighbours, 1)[0],
                torch.cat([_read(other, first, texts, 1, 1)[0] for other in others], -1),
            )
            for texts in batches(_texts(recipe), _READ_AT_ONCE)
        )
    )
    whiten, dye = whitening(std)
    basis, back = whiten * std.x_std.unsqueeze(-1), dye / std.x_std
    told = back @ penalised(std.xx, std.xy, recipe.penalty)
    directions = torch.linalg.eigh(told @ told.T)[1].flip(-1)[:, : recipe.seen]
    return _Turned((basis @ directions).float(), (directions.T @ back).float())
