"""Choosing a map: fit what is cheap, rank by how the receiver goes on, and say where none of it is worth sending.

Neither R2 nor the cosine of keys predicts answers, so neither has a say. A map is worth its bytes only if it beats the
table of tokens, which knows what was written and nothing of what it means, item by item and beyond doubt.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvferry.align.contract import Aligner, Grid
from kvferry.errors import UsageError
from kvferry.metrics.paired import Paired, paired
from kvferry.models.load import Model
from kvferry.train.cases import Way
from kvferry.train.closed import fresh
from kvferry.train.examples import Source
from kvferry.train.fidelity import Fidelity, fidelity
from kvferry.train.fit import (
    DEFAULT_ALIGNER,
    DEFAULT_CODECS,
    N_HELD_OUT,
    Material,
    Watch,
    closed_form,
    frozen,
    prepare,
    token_table,
    train,
)
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import FitRecipe
from kvferry.train.route import Route
from kvferry.train.scores import Score, behind, mean_loss, score

AUTO_RECIPE = FitRecipe(
    DEFAULT_ALIGNER,
    DEFAULT_CODECS,
    losses={"own_text": 1.0},
    loop=LoopRecipe(steps=300, learning_rate=1e-3, warmup=20, evaluate_every=50),
)
"""Cheap: what the receiver itself expects of the text teaches more in few steps than which token came."""
NEIGHBOURS = 3
N_FIDELITY = 32
CLOSED = (
    "procrustes(sources=nearest_depth)",
    "blockwise(sources='top_k_sources(k=2)')",
    "low_rank(rank=64, neighbours=3)",
    "linear(neighbours=1)",
    "linear(neighbours=3)",
)
ON_RECEIVER_GRID = ("classwise(neighbours=3)",)
TRAINED = "residual_mlp(neighbours=3, hidden=256)"
TRAINED_BY_CLASS = "residual_mlp(neighbours=3, hidden=256, classes=True)"


@dataclass(frozen=True)
class Candidate:
    """A fitted map: its mean held-out loss over the codecs on dev, and what the receiver's queries read of it."""

    spec: str
    grid: Grid
    trained: bool
    aligner: Aligner
    mb: float
    dev_loss: float
    fidelity: Fidelity

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better: first answers, then what attention reads."""
        return self.dev_loss, self.fidelity.attention_error


@dataclass(frozen=True)
class Choice:
    """The best map within the size, all that were tried, and what it is worth on test beside the table of tokens."""

    best: Candidate
    candidates: list[Candidate]
    material: Material
    scores: list[Score]
    over_table: Paired

    @property
    def worth_it(self) -> bool:
        """Whether the receiver goes on better from the map than from the table, beyond doubt."""
        return self.over_table.verdict == "a better"


def choose(
    sender: Model,
    receiver: Model,
    source: Source,
    recipe: FitRecipe,
    *,
    max_mb: float | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> Choice:
    """Fit all candidates on every grid that makes sense, under the recipe's codecs, and keep the best.

    `recipe.loop` trains the last one of each grid; its aligner and grid are not used. Raises what `fit` raises, and
    `UsageError` where no map is as small as `max_mb`.
    """
    found: list[Candidate] = []
    materials: dict[Grid, Material] = {}
    with frozen(sender), frozen(receiver):
        for grid in _grids(sender, receiver):
            own = replace(recipe, grid=grid)
            materials[grid] = prepare(Route(sender, receiver, grid), source, own, NEIGHBOURS)
            _require_one_fits(materials[grid], max_mb)
            for candidate in _candidates(materials[grid]):
                found.append(candidate)
                if on_candidate is not None:
                    on_candidate(candidate)
        fitting = [one for one in found if max_mb is None or one.mb <= max_mb]
        best = min(fitting, key=lambda one: one.rank)
        return _judged(best, found, materials[best.grid])


def _require_one_fits(material: Material, max_mb: float | None) -> None:
    """Before any of them is solved: sizes are those of the shapes. On either grid the smallest is of these."""
    if max_mb is None:
        return
    maps = (fresh(spec, material.contract, material.pairs, material.held_out) for spec in CLOSED)
    smallest = min(map(megabytes, maps))
    if not smallest <= max_mb:
        enough = math.ceil(100 * smallest) / 100
        raise UsageError(f"no map is as small as {max_mb} MB", cure=f"Allow {enough:.2f} MB")


def _grids(sender: Model, receiver: Model) -> tuple[Grid, ...]:
    """With one tokenizer both grids are the same."""
    alike = sender.geometry.tokenizer == receiver.geometry.tokenizer
    return ("sender",) if alike else ("sender", "receiver")


def _candidates(material: Material) -> Iterator[Candidate]:
    by_class = material.route.grid == "receiver"
    for spec in (*CLOSED, *(ON_RECEIVER_GRID if by_class else ())):
        yield _candidate(material, spec, closed_form(material, spec)[0], trained=False)
    if material.recipe.loop.steps:
        spec = TRAINED_BY_CLASS if by_class else TRAINED
        aligner, _ = train(material, closed_form(material, spec)[0], Watch())
        yield _candidate(material, spec, aligner, trained=True)


def _candidate(material: Material, spec: str, aligner: Aligner, *, trained: bool) -> Candidate:
    dev, route = material.take("dev", N_HELD_OUT // 2), material.route
    loss = mean_loss(score(route, behind(aligner, material.codecs), dev))
    way = Way(route.sender, route.receiver, aligner, material.codecs[0])
    near = fidelity(way, dev[:N_FIDELITY])
    return Candidate(spec, route.grid, trained, aligner, megabytes(aligner), loss, near)


def megabytes(aligner: Aligner) -> float:
    """What the folder's weights take."""
    return sum(tensor.nbytes for tensor in aligner.state_dict().values()) / 1e6


def _judged(best: Candidate, found: list[Candidate], material: Material) -> Choice:
    test = material.take("test", N_HELD_OUT)
    judged = [*behind(best.aligner, material.codecs), token_table(material)]
    *scores, beside = score(material.route, judged, test)
    # Fewer nats are better, more of what is compared is.
    over_table = paired(-scores[0].nats, -beside.nats)
    return Choice(best, found, material, [*scores, beside], over_table)
