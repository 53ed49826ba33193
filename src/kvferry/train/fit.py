"""Fit an aligner between two models: in closed form from paired caches, then trained by the receiver's answers.

A map fitted on clean caches fails under a coarse codec, and one fitted on int4 alone fails on raw. So the closed form
sums the statistics of all codecs, and every training batch passes through the next one of them.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from random import Random

import torch

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver
from kvferry.align.identity import Identity
from kvferry.align.mean_only import MeanOnly
from kvferry.align.ridge import Sums
from kvferry.align.zero_pad import ZeroPad
from kvferry.codec import Codec, roundtrip
from kvferry.errors import ModelRefused
from kvferry.kv import KV, Roundtrip
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.load import Model
from kvferry.select.contract import Selector
from kvferry.train.between import drawn
from kvferry.train.closed import fresh, neighbours_of, rehearse, solve_into, takes_penalty
from kvferry.train.examples import Batches, Example, Source, Split
from kvferry.train.loop import Evaluation, Loss, Step, Trained, Trainer
from kvferry.train.objective import Objective
from kvferry.train.paired import Pairs, collect, token_texts
from kvferry.train.recipe import FitRecipe
from kvferry.train.route import Route
from kvferry.train.scores import Judged, Score, behind, mean_cache, mean_loss, other_contexts, score, through
from kvferry.train.selection import select
from kvferry.train.sources.fitting import Fitting
from kvferry.train.trainable import Trainable, trainable

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
N_HELD_OUT = 128
DEFAULT_ALIGNER = "residual_mlp(neighbours=4, hidden=256)"
DEFAULT_CODECS = (
    "raw(dtype=float16, zstd=0)",
    "int(bits=8, group=32, axis=token, centred=False, scale=float16, zstd=0)",
    "int(bits=4, group=32, axis=channel, centred=False, scale=float16, zstd=0)",
    "int(bits=4, group=32, axis=token, centred=False, scale=float16, zstd=0)",
    "ecsq(step=-64, weighting=layer, profile=none)",
    "ecsq(step=0, weighting=layer, profile=none)",
)
DEFAULT_RECIPE = FitRecipe(DEFAULT_ALIGNER, DEFAULT_CODECS)


@dataclass(frozen=True)
class Watch:
    """Who is told of a training, and where its checkpoints lie; all may be left out."""

    on_step: Callable[[Step], None] | None = None
    on_evaluation: Callable[[Evaluation], None] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Fitted:
    """An aligner and how it came about. Scores are held out; `controls` say what they are worth."""

    aligner: Aligner
    material: "Material"
    penalty: float | None
    seconds: float
    closed_scores: list[Score]
    scores: list[Score]
    controls: list[Score]
    trained: Trained | None = None


@dataclass(frozen=True)
class Material:
    """What a fit works on: the route, examples by split, sums under all codecs, and the contract that comes of it."""

    route: Route
    source: Fitting
    recipe: FitRecipe
    codecs: list[Codec]
    pairs: Pairs
    contract: Contract
    digest: str
    """SHA-256 of the texts that the sums are of."""

    @property
    def seed(self) -> int:
        return self.recipe.loop.seed

    @cached_property
    def selectors(self) -> list[Selector]:
        return self.recipe.selectors()

    def take(self, split: Split, n: int) -> list[Example]:
        """The first `n` examples of a split."""
        return list(islice(self.source.examples(split, self.seed), n))

    def held_out(self) -> Sums:
        """Sums over texts of dev."""
        texts = [example.context for example in self.take("dev", N_HELD_OUT)]
        return collect(self.route, texts, trips(self.codecs), neighbours=self.pairs.neighbours).sums


def fit(
    sender: Model, receiver: Model, source: Source, recipe: FitRecipe, watch: Watch | None = None
) -> Fitted:
    """Fit on the source's train split; penalty and weights are chosen on dev, scores are from test.

    Raises `UsageError` where the map cannot be built or the models share no text, `TrainingDiverged` where a loss is
    not finite, `FolderError` for a checkpoint folder of another fit or one that cannot be written.
    """
    start = time.perf_counter()
    rehearse(recipe.aligner, Contract(sender.geometry, receiver.geometry, recipe.grid))
    with frozen(sender), frozen(receiver):
        material = prepare(Route(sender, receiver, recipe.grid), source, recipe)
        aligner, penalty = closed_form(material, recipe.aligner)
        test = material.take("test", N_HELD_OUT)
        closed = scores = score(material.route, behind(aligner, material.codecs), test)
        trained = None
        if recipe.loop.steps:
            aligner, trained = train(material, aligner, watch or Watch())
            scores = score(material.route, behind(aligner, material.codecs), test)
        controls = score_controls(material, aligner, test)
    seconds = time.perf_counter() - start
    return Fitted(aligner, material, penalty, seconds, closed, scores, controls, trained)


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No gradient reaches the model's weights; checked afterwards to be what they were."""
    before = model_fingerprint(model.hf, model.geometry.layers)
    trainable_ones = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    for parameter in trainable_ones:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable_ones:
            parameter.requires_grad_(True)
    if model_fingerprint(model.hf, model.geometry.layers) != before:
        raise ModelRefused(
            f"the weights of {model.name} changed during the fit", cure="Fit on a model in eval mode"
        )


def trips(codecs: Sequence[Codec]) -> list[Roundtrip]:
    """What the wire does to a cache, codec by codec."""
    return [partial(roundtrip, codec) for codec in codecs]


def prepare(route: Route, source: Source, recipe: FitRecipe, neighbours: int | None = None) -> Material:
    """Read the texts with both models, through every codec."""
    codecs, source = recipe.parsed(), Fitting(source, route.sender, route.receiver)
    texts = [
        example.context for example in islice(source.examples("train", recipe.loop.seed), recipe.data.texts)
    ]
    wide = neighbours_of(recipe.aligner) if neighbours is None else neighbours
    pairs = collect(route, texts, trips(codecs), neighbours=wide)
    contract = Contract(
        sender=route.sender.geometry,
        receiver=route.receiver.geometry,
        grid=route.grid,
        coded_with=tuple(repr(codec.agreed()) for codec in codecs),
        stride=pairs.stride,
    )
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Material(route, source, recipe, codecs, pairs, contract, digest)


def closed_form(material: Material, spec: str) -> tuple[Aligner, float | None]:
    """An aligner in closed form, and the penalty behind which the receiver goes on best, over all codecs, on dev."""
    material = replace(material, pairs=material.pairs.narrowed(neighbours_of(spec)))
    first = fresh(spec, material.contract, material.pairs, material.held_out)
    if not takes_penalty(first.name):
        return _solved(material, first, 0.0), None
    tried = [_solved(material, first, penalty) for penalty in PENALTIES]
    dev, n = material.take("dev", N_HELD_OUT // 2), len(material.codecs)
    found = score(material.route, [one for map_ in tried for one in behind(map_, material.codecs)], dev)
    losses = [mean_loss(found[start : start + n]) for start in range(0, len(found), n)]
    best = min(range(len(tried)), key=lambda index: losses[index])
    return tried[best], PENALTIES[best]


def _solved(material: Material, like: Aligner, penalty: float) -> Aligner:
    torch.manual_seed(material.seed)  # what has no closed form starts at random
    aligner = type(like)(material.contract, **like.options()).to(material.route.receiver.device).eval()
    solve_into(aligner, material.pairs, penalty)
    return aligner


def train(material: Material, aligner: Aligner, watch: Watch) -> tuple[Aligner, Trained]:
    """Train from where an aligner stands, behind selections and codecs in turn; what is best on dev is kept."""
    recipe, route = material.recipe, material.route
    module = trainable(aligner, material.pairs)
    texts = material.take("train", recipe.data.texts)
    objective = Objective.prepared(route.receiver, recipe.losses, material.contract.stride, texts)
    dev = material.take("dev", N_HELD_OUT // 2)
    trainer = Trainer(
        module,
        partial(_loss, material, module, objective),
        Batches(material.source, "train", recipe.loop.seed + 1, recipe.data.batch_size),
        recipe.loop,
        evaluate=partial(_dev_loss, material, module, dev),
        folder=watch.folder,
        identity=_identity(material),
        on_step=watch.on_step,
        on_evaluation=watch.on_evaluation,
    )
    trained = trainer.run()
    return module.finish().eval(), trained


def score_controls(material: Material, aligner: Aligner, examples: Sequence[Example]) -> list[Score]:
    """The receiver's own cache; the sender's with only its shape fitted; the map's of another context and of a mean
    cache; and what needs no map: the receiver's mean entry and its table of tokens."""
    route, receiver = material.route, material.route.receiver
    alone = Contract(sender=receiver.geometry, receiver=receiver.geometry)
    own = [through("the receiver's own cache", Identity(alone))]
    others = [
        through("cut or padded with zeros", ZeroPad(material.contract)),
        through("another context", aligner, other_contexts),
        through("mean cache", aligner, mean_cache),
        through("mean entry", closed_form(material, MeanOnly.name)[0]),
        token_table(material),
    ]
    return [*score(Route(receiver, receiver), own, examples), *score(route, others, examples)]


def token_table(material: Material) -> Judged:
    """The honest zero: the receiver's mean entry for the text of each token, known here and not recognised."""
    known, receiver = material.pairs.tokens, material.contract.receiver

    def look_up(sent: KV, contexts: Sequence[str]) -> KV:
        return as_receiver(sent, known.entries_of(token_texts(sent, contexts)).to(sent.device), receiver)

    return Judged("token table", look_up, material.contract.stride)


def _loss(
    material: Material, module: Trainable, objective: Objective, step: int, rows: Sequence[Example]
) -> Loss:
    turn, index = divmod(step, len(material.codecs))
    codec = drawn(material.codecs, index, Random(f"{material.seed} {step}"))
    kept = select(material.selectors[turn % len(material.selectors)], _sent(material, rows))
    return objective(module(roundtrip(codec, kept)), rows, step)


def _sent(material: Material, rows: Sequence[Example]) -> KV:
    return material.route.sent([row.context for row in rows])


def _dev_loss(material: Material, module: Trainable, dev: Sequence[Example]) -> float:
    """Nats per token, mean over selections and codecs."""
    objective = Objective(material.route.receiver, {"answer": 1.0}, material.contract.stride)
    sent = _sent(material, dev)
    kept = [select(selector, sent) for selector in material.selectors]
    losses = [objective(module(roundtrip(codec, one)), dev) for codec in material.codecs for one in kept]
    return sum(float(loss.total) / loss.n for loss in losses) / len(losses)


def _identity(material: Material) -> dict[str, object]:
    """What a checkpoint must agree in beside the loop's recipe."""
    contract = material.contract
    recipe = asdict(material.recipe)
    recipe.pop("loop")
    models = {"sender": contract.sender.model, "receiver": contract.receiver.model}
    return {**models, "source": material.source.name, "texts": material.digest, "recipe": recipe}
