"""`kvferry curve`: accuracy against measured bytes, for any ways of sending."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import AlignerOption, choose_aligner
from kvferry.cli.paths import require_files, require_folders

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.lab.curve.ledger import Ledger
    from kvferry.lab.curve.result import CurveResult
    from kvferry.lab.curve.road import Road
    from kvferry.lab.curve.run import Settings

_WIDE = 200
"""Columns of a table of many numbers, where the terminal is narrower."""


PairOption = Annotated[str, typer.Option(help="SENDER-to-RECEIVER; a model to itself needs no aligner.")]
TaskOption = Annotated[
    str, typer.Option(help="place:8, place:16, place:32, met:8, needle, two_hops or continuation.")
]
SpecsOption = Annotated[
    list[str] | None, typer.Option(help="'SELECTOR | CODEC'; may be repeated, or several separated by ';'.")
]
FileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="One spec to a line; # begins a comment.")
]
CapsOption = Annotated[
    str | None, typer.Option(help="Bytes: 64,128,...,4096,full; '...' doubles. Default: 10 and full.")
]
ItemsOption = Annotated[int, typer.Option(min=2, help="Test items of each seed, an even number.")]
DevOption = Annotated[int, typer.Option(min=2, help="Dev items, to choose a family's best spec on.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Each has items of its own.")]
TextsOption = Annotated[
    int, typer.Option(min=32, help="For continuation without --aligner: texts of the maps' closed forms.")
]
CacheOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Holds the ledger of what was measured, and fitted maps.")
]
ResumeFlag = Annotated[bool, typer.Option("--resume", help="Take over what the ledger holds.")]
ForecastFlag = Annotated[bool, typer.Option("--forecast-only", help="Only say how long it takes.")]
JsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write points and verdicts as JSON.")]
CsvOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a row for each point.")]
PngOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture (extra: report).")]


def curve(
    pair: PairOption,
    task: TaskOption = "place:8",
    specs: SpecsOption = None,
    specs_file: FileOption = None,
    caps: CapsOption = None,
    items: ItemsOption = 200,
    dev_items: DevOption = 64,
    seeds: SeedsOption = 3,
    aligner: AlignerOption = None,
    fit_texts: TextsOption = 600,
    cache: CacheOption = Path("curve-cache"),
    resume: ResumeFlag = False,
    forecast_only: ForecastFlag = False,
    json: JsonOption = None,
    csv: CsvOption = None,
    png: PngOption = None,
) -> None:
    """Accuracy against measured bytes for any ways of sending, beside text; who needs fewer, with intervals."""
    from rich.console import Console

    from kvferry.lab.curve.caps import DEFAULT_CAPS, caps_of
    from kvferry.lab.curve.ledger import Ledger
    from kvferry.lab.curve.plot import require_matplotlib
    from kvferry.lab.curve.road import pair_named
    from kvferry.lab.curve.run import Settings, require
    from kvferry.lab.curve.spec import DEFAULT_SPECS, specs_of
    from kvferry.lab.curve.task import task_of

    require_files(json, csv, png)
    require_folders(cache)
    if png:
        require_matplotlib()
    named = specs_of(specs or ([] if specs_file else DEFAULT_SPECS), specs_file)
    settings = Settings(
        task_of(task), named, caps_of(DEFAULT_CAPS if caps is None else caps), items, dev_items, seeds
    )
    console = Console(stderr=True, highlight=False)
    road = _road(pair_named(pair), settings, aligner, cache, fit_texts, console)
    require(road, settings)
    ledger = Ledger(cache / "ledger.jsonl", resume=resume)
    _tell(road, settings, ledger, console)
    if forecast_only:
        return
    result = _run(road, settings, ledger, console)
    _write(result, json, csv, png)
    _show(result)


def _road(
    pair: tuple[str, str],
    settings: "Settings",
    aligner: str | None,
    cache: Path,
    fit_texts: int,
    console: "Console",
) -> "Road":
    from kvferry.lab.curve.road import road_of, road_of_stories

    if aligner is None and not settings.task.recalls and pair[0] != pair[1]:
        return road_of_stories(pair, settings.specs, cache, fit_texts, console.print)
    return road_of(pair, choose_aligner(aligner, *pair))


def _tell(road: "Road", settings: "Settings", ledger: "Ledger", console: "Console") -> None:
    from kvferry.lab.curve.run import forecast
    from kvferry.lab.curve.sheets import forecast_sheet
    from kvferry.lab.wire.tables import rich_table

    found = forecast(road, settings, ledger)
    if found:
        console.print(rich_table(forecast_sheet(found)))
    console.print(f"about {sum(one.seconds for one in found) / 60:.0f} minutes")


def _run(road: "Road", settings: "Settings", ledger: "Ledger", console: "Console") -> "CurveResult":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from kvferry.lab.curve.caps import cap_name
    from kvferry.lab.curve.run import Job, jobs_of, run_curve

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=len(jobs_of(settings)))

        def on_job(job: Job) -> None:
            what = f"{job.split} {job.seed}: {job.arm.name}, {cap_name(job.cap)}"
            progress.update(bar, description=what, advance=1)
            if not console.is_terminal:
                console.print(what, markup=False)

        return run_curve(road, settings, ledger, on_job)


def _write(result: "CurveResult", json: Path | None, csv: Path | None, png: Path | None) -> None:
    from kvferry.lab.curve.plot import draw
    from kvferry.lab.curve.result import as_csv, written
    from kvferry.lab.ledger import write_file
    from kvferry.lab.picture import as_bytes

    if json:
        write_file(json, written(result))
    if csv:
        write_file(csv, as_csv(result))
    if png:
        write_file(png, as_bytes(draw(result), "png"))


def _show(result: "CurveResult") -> None:
    from rich.console import Console

    from kvferry.lab.curve.sheets import sheets
    from kvferry.lab.wire.tables import rich_table

    out = Console(highlight=False, width=_WIDE)
    for sheet in sheets(result):
        out.print(rich_table(sheet))
    out.print(f"{len(result.points)} points in {result.seconds:.0f} s")
