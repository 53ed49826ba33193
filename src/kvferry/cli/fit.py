"""`kvferry fit`: a map from one model's cache to another's."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import RECEIVER, SENDER, JsonFlag, ReceiverOption, SenderOption

if TYPE_CHECKING:
    from kvferry.train.fit import Fitted, OnStep, Recipe


def fit(
    out: Annotated[Path, typer.Option(help="Folder to write; an aligner that lies there is replaced.")],
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    codecs: Annotated[
        str | None,
        typer.Option(help="Specs separated by ';' that the map must bear. Default: raw, int8, int4, ecsq."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text, or JSON lines of context, question, answer. Default: the zoo's worlds."),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Training steps after the closed form; 0 for the ridge alone.")
    ] = 3000,
    texts: Annotated[int, typer.Option(help="Texts for the closed form.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Contexts per training step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, in whitened coordinates.")] = 7e-4,
    neighbours: Annotated[
        int, typer.Option(help="Sender tokens the map sees for each token: itself and those before.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Decides which examples are drawn.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Fit an aligner: in closed form, then by the receiver's answers, through every codec in turn."""
    from kvferry.align.folder import save_aligner
    from kvferry.codec.profile import save_profile
    from kvferry.codec.profiles import SUFFIX, find_profile, name_of
    from kvferry.models.load import load, public_name
    from kvferry.train.card import card
    from kvferry.train.examples import source_of
    from kvferry.train.fit import DEFAULT_CODECS, Recipe
    from kvferry.train.fit import fit as fit_pair

    chosen = tuple(part.strip() for part in codecs.split(";")) if codecs else DEFAULT_CODECS
    recipe = Recipe(chosen, texts, steps, batch_size, learning_rate, neighbours, seed)
    source, target = load(sender), load(receiver)
    with _Progress(recipe) as on_step:
        fitted = fit_pair(source, target, source_of(data, target.prompt), recipe, on_step=on_step)
    names = public_name(sender), public_name(receiver)
    save_aligner(fitted.aligner, out, card(fitted, *names, _command(*names, data, recipe)))
    for profile_hash in {codec.profile_hash for codec in recipe.parsed()} - {0}:
        held = find_profile(name_of(profile_hash))
        save_profile(held, out / f"{held.name}{SUFFIX}")
    _show(fitted, out, json)


class _Progress:
    """A bar on stderr that shows the smoothed loss."""

    def __init__(self, recipe: "Recipe") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("closed form", total=max(recipe.steps, 1))
        self._loss: float | None = None

    def __enter__(self) -> "OnStep":
        self._bar.start()
        return self._step

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _step(self, step: int, loss: float) -> None:
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._bar.update(self._task, completed=step + 1, description=f"loss {self._loss:.3f}")


def _command(sender: str, receiver: str, data: Path | None, recipe: "Recipe") -> str:
    """The call that makes the same folder again."""
    words = [f"kvferry fit --sender {sender} --receiver {receiver} --codecs '{'; '.join(recipe.codecs)}'"]
    words += [f"--data {data.name}"] if data else []
    words += [f"--steps {recipe.steps} --texts {recipe.n_texts} --batch-size {recipe.batch_size}"]
    words += [
        f"--learning-rate {recipe.learning_rate:g} --neighbours {recipe.neighbours} --seed {recipe.seed} --out DIR"
    ]
    return " ".join(words)


def _show(fitted: "Fitted", out: Path, json: bool) -> None:
    rows = [*fitted.scores, *fitted.controls]
    if json:
        content = {"out": str(out), "seconds": fitted.seconds, "scores": [asdict(row) for row in rows]}
        print(json_module.dumps(content))
        return
    for row in rows:
        print(f"{row.codec:40} {row.loss:8.4f} nats per token {row.accuracy:8.3f} answers right")
    print(f"{out}  ({fitted.seconds:.0f} s)")
