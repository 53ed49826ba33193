"""Train a fuser by the receiver's answers: two models read the same prompts, and only the fuser learns.

All prompts are read once, before the first step: neither model changes, so what they read does not either. A batch is
read as a whole and used many times.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from kvferry.codec import CODECS, Codec
from kvferry.errors import UsageError
from kvferry.fuse.contract import Fuser
from kvferry.fuse.folder import make_fuser, save_fuser
from kvferry.fuse.space import to_space
from kvferry.models.load import Model, public_name
from kvferry.train.both_read import Both, BothRead, Hears, answer_loss
from kvferry.train.examples import Source
from kvferry.train.fit import frozen
from kvferry.train.loop import Loss, Step, Trained, Trainer
from kvferry.train.loop_recipe import LoopRecipe


@dataclass(frozen=True)
class FuserRecipe:
    """What is trained and how. `options` are the fuser's; of `prompts`, the first `start` are for `Fuser.start`.

    Raises `UsageError` for numbers out of range.
    """

    fuser: str = "gated_residual"
    options: dict[str, Any] = field(default_factory=lambda: {"rank": 32, "width": 256})
    loop: LoopRecipe = field(default_factory=lambda: LoopRecipe(steps=600, learning_rate=3e-3))
    hears: Hears = "prompt"
    codecs: tuple[str, ...] = ("raw",)
    """What arrives has come through each of them in turn; `raw` alone is the cache as it is."""
    prompts: int = 3200
    start: int = 256
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not (1 <= self.batch_size <= self.prompts and self.start >= 1):
            what = f"{self.prompts} prompts, {self.start} for the start, in batches of {self.batch_size}"
            raise UsageError(what, cure="Give at least one batch, and one prompt for the start")
        if not self.codecs:
            raise UsageError("no codec", cure="Name one at least; raw is the cache as it is")

    def codec(self, number: int) -> Codec:
        """The codec of a batch."""
        return CODECS.parse(self.codecs[number % len(self.codecs)])


@dataclass(frozen=True)
class FittedFuser:
    """A trained fuser, in evaluation mode, and how it came about."""

    fuser: Fuser
    recipe: FuserRecipe
    models: tuple[str, str]
    source: str
    trained: Trained
    seconds: float

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.fuser.parameters())

    def save(self, folder: Path, said: str = "") -> None:
        """Write the fuser's folder; `said` are lines for its card, of how well it does. Raises `FolderError`."""
        save_fuser(self.fuser, folder, f"{self._card()}\n{said}".rstrip() + "\n")

    def _card(self) -> str:
        (sender, receiver), recipe = self.models, self.recipe
        return (
            f"# {recipe.fuser}: {sender} to {receiver}\n\n"
            f"- **heard**: the {recipe.hears}, through {'; '.join(self.fuser.coded_with)}\n"
            f"- **data**: {self.source}, {recipe.prompts} prompts\n"
            f"- **training**: {self.trained.steps} steps of {recipe.batch_size} at {recipe.loop.learning_rate:g}, "
            f"seed {recipe.loop.seed}, {self.seconds:.0f} s\n"
            f"- **size**: {self.n_parameters:,} parameters, {4e-6 * self.n_parameters:.2f} MB in fp32\n"
        )


def fit_fuser(
    sender: Model,
    receiver: Model,
    source: Source,
    recipe: FuserRecipe,
    on_step: Callable[[Step], None] | None = None,
) -> FittedFuser:
    """Train on the source's train split. Sender and receiver may be one model: what training alone is worth.

    Raises `UnknownName` for no such fuser, `TrainingDiverged` where a loss is not finite, what `Trainer` raises.
    """
    begun = time.perf_counter()
    with ExitStack() as both_frozen:
        for model in (sender, receiver):
            both_frozen.enter_context(frozen(model))
        both = Both(sender, receiver, recipe.hears)
        fuser = _fresh(both, source, recipe)
        batches = _batches(both, source, recipe)
        trained = _train(fuser, batches, recipe, on_step)
    names = (public_name(sender.name), public_name(receiver.name))
    return FittedFuser(fuser.eval(), recipe, names, source.name, trained, time.perf_counter() - begun)


def _fresh(both: Both, source: Source, recipe: FuserRecipe) -> Fuser:
    torch.manual_seed(recipe.loop.seed)
    fuser = make_fuser(recipe.fuser, both.sender.geometry, both.receiver.geometry, recipe.options)
    first = both.read(list(islice(source.examples("train", recipe.loop.seed), recipe.start)), recipe.codec(0))
    fuser.to(both.receiver.device)
    fuser.coded_with = tuple(repr(CODECS.parse(codec).agreed()) for codec in recipe.codecs)
    fuser.start(to_space(first.prompted.own, fuser.space), to_space(first.arrived, fuser.space))
    return fuser


def _batches(both: Both, source: Source, recipe: FuserRecipe) -> list[BothRead]:
    """Whole batches of the train split, as both models read them."""
    examples = source.examples("train", recipe.loop.seed)
    n_batches = recipe.prompts // recipe.batch_size
    return [
        both.read(list(islice(examples, recipe.batch_size)), recipe.codec(number))
        for number in range(n_batches)
    ]


def _train(
    fuser: Fuser, batches: Sequence[BothRead], recipe: FuserRecipe, on_step: Callable[[Step], None] | None
) -> Trained:
    def loss(step: int, rows: Sequence[BothRead]) -> Loss:
        fuser.anneal(step / recipe.loop.steps)
        return answer_loss(fuser, rows[0])

    def stream(start: int) -> Iterator[Sequence[BothRead]]:
        return ([batches[number % len(batches)]] for number in count(start))

    return Trainer(fuser, loss, stream, recipe.loop, on_step=on_step).run()
