"""Fit an importance: how coarsely each slot may be sent, for a pair of models, learned from the receiver's answers.

Steps of so many octaves are laid over the cache, noise of such steps is added at a fixed rate, and the receiver goes on
behind it. At a fixed rate a finer step here is paid for by a coarser one there: what is learned is where bits count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Aligner
from kvferry.codec import CODECS
from kvferry.codec.offer import Offering
from kvferry.errors import UsageError
from kvferry.kv import KV
from kvferry.select.importance import IMPORTANCES, Importance
from kvferry.train.answer_loss import answer_scores, continuations
from kvferry.train.examples import Batches, Example, Source
from kvferry.train.fit import frozen
from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.rate_noise import Channels
from kvferry.train.reports import Step
from kvferry.train.route import Route

_DRAWN_AFTER = 1 << 20
"""Training draws examples beyond those that were measured."""


@dataclass(frozen=True)
class ImportanceRecipe:
    """Rates are drawn between these bits a number, evenly on a logarithmic scale."""

    codec: str = "ecsq"
    lowest_bits: float = 0.02
    highest_bits: float = 0.3
    n_measured: int = 32
    batch_size: int = 16
    seed: int = 0
    loop: LoopRecipe = field(default_factory=lambda: LoopRecipe(steps=500, learning_rate=3e-3, warmup=10))

    def __post_init__(self) -> None:
        if not 0 < self.lowest_bits <= self.highest_bits:
            what = f"rates from {self.lowest_bits} to {self.highest_bits} bits a number"
            raise UsageError(what, cure="Give two rates above 0, the lower one first")
        if self.n_measured < 1 or self.batch_size < 1:
            what = f"n_measured is {self.n_measured}, batch_size {self.batch_size}"
            raise UsageError(what, cure="Give at least 1")
        if self.loop.steps < 1:
            raise UsageError(f"steps is {self.loop.steps}", cure="Give at least 1")


def fit_importance(
    route: Route,
    aligner: Aligner,
    source: Source,
    recipe: ImportanceRecipe,
    on_step: Callable[[Step], None] | None = None,
) -> Importance:
    """The importance of what a sender holds, for this receiver behind this aligner, both left as they are.

    Raises `UsageError` for a codec without a menu, `TrainingDiverged`.
    """
    codec = CODECS.parse(recipe.codec)
    if not isinstance(codec, Offering):
        raise UsageError(f"{codec!r} has no precision classes", cure="Fit for ecsq or mixed")
    examples = source.examples("train", recipe.seed)
    measured = route.sent([example.context for example in islice(examples, recipe.n_measured)])
    channels, importance = Channels.of(measured, codec), _fresh(route, recipe.seed).to(measured.device)
    importance.standardise(measured)
    with frozen(route.sender), frozen(route.receiver):
        aligner.requires_grad_(False)
        loss = _Behind(route, aligner, channels, importance, recipe)
        drawn = Batches(source, "train", recipe.seed + _DRAWN_AFTER, recipe.batch_size)
        Trainer(importance, loss, drawn, recipe.loop, on_step=on_step).run()
    return importance


def _fresh(route: Route, seed: int) -> Importance:
    """Random where it starts at random, by the seed; torch's own generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Importance(route.sender.geometry, route.grid)


@dataclass(frozen=True)
class _Behind:
    """How well the receiver answers behind noise of the learned steps."""

    route: Route
    aligner: Aligner
    channels: Channels
    importance: Importance
    recipe: ImportanceRecipe

    def __call__(self, step: int, rows: Sequence[Example]) -> Loss:
        sent = self.route.sent([row.context for row in rows])
        n_numbers = sent.present.any(0).sum(-1) * sent.geometry.floats_per_token
        low, high = self.recipe.lowest_bits, self.recipe.highest_bits
        rate = low * (high / low) ** torch.rand(sent.n_batch, device=sent.device)
        octaves = self.channels.at_rate(sent, self._octaves(sent), rate * n_numbers)
        arrived = self.aligner(self.channels.through(sent, octaves))
        after = continuations(self.route.receiver, rows)
        scores = answer_scores(self.route.receiver, arrived, after, self.aligner.contract.stride)
        return Loss(scores.nats, scores.n_tokens)

    def _octaves(self, sent: KV) -> Float[Tensor, "layers 2 batch tokens"]:
        return self.importance(sent).expand(sent.geometry.n_layers, 2, -1, -1)


def card_of(route: Route, recipe: ImportanceRecipe, losses: Sequence[float]) -> str:
    """What a reader of the folder must know."""
    start, end = (sum(part) / max(len(part), 1) for part in (losses[:20], losses[-20:]))
    return (
        f"# Importance of {route.sender.name}'s slots to {route.receiver.name}\n\n"
        f"Fitted under `{recipe.codec}`, {len(losses)} steps of {recipe.batch_size} contexts, rates of "
        f"{recipe.lowest_bits} to {recipe.highest_bits} bits a number, seed {recipe.seed}. Nats per scored token "
        f"behind the noise, mean of the first and of the last steps: {start:.3f} and {end:.3f}.\n\n"
        f"Use it with `--select \"lagrangian(importance='FOLDER')\"`.\n"
    )


def write_importance(
    importance: Importance, route: Route, recipe: ImportanceRecipe, folder: Path, card: str
) -> None:
    """The folder of an importance, bound to its sender."""
    codec = repr(CODECS.parse(recipe.codec).agreed())
    fitted_for = {"grid": route.grid, "receiver": route.receiver.name, "codec": codec}
    IMPORTANCES.save(importance, route.sender.geometry, fitted_for, folder, card)
