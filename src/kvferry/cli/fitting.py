"""What `kvferry fit` shows while it runs and afterwards."""

import json as json_module
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvferry.cli.data import source_named
from kvferry.models.load import Model, public_name
from kvferry.train.auto import Candidate, choose
from kvferry.train.fit import Watch, fit
from kvferry.train.journal import Journal
from kvferry.train.loop import Step
from kvferry.train.recipe import FitRecipe
from kvferry.train.report import Report, report_choice, report_fit
from kvferry.train.scores import Score
from kvferry.train.sources.example import Source, require_splits

Models = tuple[Model, Model]


def fit_one(
    models: Models, recipe: FitRecipe, checkpoints: Path | None, journal: Path | None, command: str
) -> Report:
    """The map of the recipe."""
    source = _open(recipe, models)
    with ExitStack() as stack:
        show = stack.enter_context(_progress(recipe.loop.steps))
        log = stack.enter_context(Journal(journal)) if journal else None

        def on_step(step: Step) -> None:
            show(step)
            if log is not None:
                log.step(step)

        watch = Watch(on_step, log.evaluation if log else None, checkpoints)
        fitted = fit(*models, source, recipe, watch)
    return report_fit(fitted, _names(models), command)


def fit_auto(models: Models, recipe: FitRecipe, max_mb: float | None, command: str) -> Report:
    """The best map of all that are cheap."""
    start, source = time.perf_counter(), _open(recipe, models)
    choice = choose(*models, source, recipe, max_mb=max_mb, on_candidate=_tell)
    return report_choice(choice, _names(models), command, time.perf_counter() - start)


def _open(recipe: FitRecipe, models: Models) -> Source:
    source = source_named(recipe.data.source, *models)
    require_splits(source)
    return source


def show(report: Report, out: Path, json: bool) -> None:
    """Scores and controls on stdout."""
    if json:
        rows = [_row(one) for one in (*report.scores, *report.controls)]
        content = {"out": str(out), "seconds": report.seconds, "scores": rows, "verdict": report.verdict}
        content |= {"left_out": report.n_left_out}
        print(json_module.dumps(content))
        return
    for one in (*report.scores, *report.controls):
        print(f"{one.name:40} {one.loss:8.4f} nats per token {one.accuracy:8.3f} answers right")
    if report.n_left_out:
        print(f"{report.n_left_out} texts were left out: the models have no positions for them")
    if report.verdict:
        print(report.verdict)
    print(f"{out}  ({report.seconds:.0f} s)")


def _row(one: Score) -> dict[str, object]:
    intervals = {"loss_ci95": one.loss_ci95, "accuracy_ci95": one.accuracy_ci95}
    return {"name": one.name, "loss": one.loss, "accuracy": one.accuracy, **intervals}


def _names(models: Models) -> tuple[str, str]:
    sender, receiver = (public_name(model.name) for model in models)
    return sender, receiver


def _tell(found: Candidate) -> None:
    how = "trained" if found.trained else "closed form"
    Console(stderr=True).print(
        f"{found.spec} on the {found.grid} grid, {how}, {found.mb:.2f} MB: {found.dev_loss:.4f} nats per token on dev",
        highlight=False,
    )


@contextmanager
def _progress(n_steps: int) -> Iterator["_Bar"]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, n_steps)


class _Bar:
    """Shows the smoothed loss."""

    def __init__(self, bar: Progress, n_steps: int) -> None:
        self._bar = bar
        self._task = bar.add_task("closed form", total=max(n_steps, 1))
        self._loss: float | None = None

    def __call__(self, step: Step) -> None:
        self._loss = step.loss if self._loss is None else 0.95 * self._loss + 0.05 * step.loss
        self._bar.update(self._task, completed=step.step + 1, description=f"loss {self._loss:.3f}")
