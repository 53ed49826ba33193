"""`kvferry fit`: a map from one model's cache to another's."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvferry.cli.choices import (
    RECEIVER,
    SENDER,
    DataOption,
    JsonFlag,
    ReceiverOption,
    SenderOption,
    choose_codec,
)
from kvferry.cli.paths import require_files, require_folders
from kvferry.errors import UsageError

if TYPE_CHECKING:
    from kvferry.train.recipe import FitRecipe


RecipeOption = Annotated[
    Path | None, typer.Option(help="YAML that says everything below; what is given beside it wins.")
]
AlignerSpec = Annotated[
    str | None,
    typer.Option("--aligner", help="Spec of the map. Default: residual_mlp(neighbours=4, hidden=256)."),
]
Codecs = Annotated[
    str | None,
    typer.Option(help="Specs separated by ';' that the map must bear. Default: raw, int8, int4, ecsq."),
]
Selections = Annotated[
    str | None,
    typer.Option(help="Selectors separated by ';' that training takes turns in. Default: all."),
]
GridOption = Annotated[
    Literal["sender", "receiver"] | None,
    typer.Option(help="Whose tokens the slots are. Default: the sender's."),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Steps after the closed form, 0 for that alone. Default: 3000, with --auto 300."),
]
Texts = Annotated[int | None, typer.Option(help="Texts for the closed form. Default: 512.")]
BatchSize = Annotated[int | None, typer.Option(help="Contexts per training step. Default: 16.")]
LearningRate = Annotated[float | None, typer.Option(help="Of Adam, at its peak. Default: 7e-4.")]
Seed = Annotated[int | None, typer.Option(help="Decides which examples are drawn. Default: 0.")]
Auto = Annotated[bool, typer.Option("--auto", help="Fit every cheap map, on either grid, and keep the best.")]
MaxMb = Annotated[float | None, typer.Option(help="With --auto: largest size of the map in MB.")]
Checkpoints = Annotated[
    Path | None, typer.Option(help="Folder of checkpoints; a fit that was stopped goes on from there.")
]
JournalOption = Annotated[Path | None, typer.Option(help="JSON lines of every step and evaluation.")]


def fit(
    out: Annotated[Path, typer.Option(help="Folder to write; an aligner that lies there is replaced.")],
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    recipe: RecipeOption = None,
    aligner: AlignerSpec = None,
    codecs: Codecs = None,
    selections: Selections = None,
    data: DataOption = None,
    grid: GridOption = None,
    steps: Steps = None,
    texts: Texts = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    auto: Auto = False,
    max_mb: MaxMb = None,
    checkpoints: Checkpoints = None,
    journal: JournalOption = None,
    json: JsonFlag = False,
) -> None:
    """Fit an aligner: in closed form, then by the receiver's answers, through every codec in turn."""
    from kvferry.cli.fitting import fit_auto, fit_one, show
    from kvferry.models.load import load, public_name
    from kvferry.train.auto import AUTO_RECIPE
    from kvferry.train.fit import DEFAULT_RECIPE
    from kvferry.train.recipe import load_recipe

    beside = _given(aligner=aligner, grid=grid, checkpoints=checkpoints, journal=journal)
    _check_auto(auto, max_mb, list(beside))
    base = load_recipe(recipe) if recipe else AUTO_RECIPE if auto else DEFAULT_RECIPE
    chosen = replace(
        base,
        loop=replace(base.loop, **_given(steps=steps, learning_rate=learning_rate, seed=seed)),
        data=replace(base.data, **_given(source=data, texts=texts, batch_size=batch_size)),
        **_given(aligner=aligner, grid=grid, codecs=_specs(codecs), selections=_specs(selections)),
    )
    for spec in chosen.codecs:
        choose_codec(spec)
    require_folders(out, checkpoints)
    require_files(journal)
    models = load(sender), load(receiver)
    names = public_name(sender), public_name(receiver)
    if auto:
        cap = "" if max_mb is None else f" --max-mb {max_mb:g}"
        report = fit_auto(models, chosen, max_mb, _command(names, f"--auto{cap}", chosen))
    else:
        which = f"--aligner {shlex.quote(chosen.aligner)} --grid {chosen.grid}"
        report = fit_one(models, chosen, checkpoints, journal, _command(names, which, chosen))
    report.save(out)
    show(report, out, json)


def _check_auto(auto: bool, max_mb: float | None, beside: list[str]) -> None:
    """A `UsageError` for options that do not go together."""
    if max_mb is not None and not auto:
        raise UsageError("--max-mb without --auto", cure="Say --auto, or choose the map by --aligner")
    if max_mb is not None and not max_mb > 0:
        raise UsageError(f"--max-mb {max_mb:g}", cure="Give more than 0 MB")
    if auto and beside:
        cure = "Leave it out: --auto tries every map on either grid"
        raise UsageError(f"--{beside[0]} with --auto", cure=cure)


def _given(**options: object) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _specs(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(";")) if text else None


def _command(names: tuple[str, str], which: str, recipe: "FitRecipe") -> str:
    """The call that makes the same folder again, but for a recipe's finer points, which the card names."""
    loop, data = recipe.loop, recipe.data
    selections = "; ".join(recipe.selections)
    kept = "" if selections == "all" else f" --selections {shlex.quote(selections)}"
    where = data.source if data.source.startswith("datasets:") else Path(data.source).name
    source = "" if where == "worlds" else f" --data {shlex.quote(where)}"
    return (
        f"kvferry fit --sender {names[0]} --receiver {names[1]} {which}"
        f" --codecs {shlex.quote('; '.join(recipe.codecs))}{kept}{source} --steps {loop.steps}"
        f" --texts {data.texts} --batch-size {data.batch_size} --learning-rate {loop.learning_rate:g}"
        f" --seed {loop.seed} --out DIR"
    )
