"""`kvferry bench`: what is measured side by side, in one process."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import choose_codec
from kvferry.cli.points import PageFile, PointsFile, show_points, writable

if TYPE_CHECKING:
    from kvferry.lab.wire.bench import Settings, WireResult

_WIDE = 200
"""Columns of a table of many numbers, where the terminal is narrower."""
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder or zoo name; may be repeated. Default: the shared folder's models and the zoo."
    ),
]

bench = typer.Typer(no_args_is_help=True, help="Measure ours and others side by side, in one process.")


@bench.callback()
def benches() -> None:
    """Measure ours and others side by side, in one process."""


@bench.command("wire")
def bench_wire(
    models: ModelsOption = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Length of a cache; may be repeated.")
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(help="Specs of our codecs separated by ';'. Default: all, along their curves."),
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help="Names of peers separated by ','; empty for none. Default: all.")
    ] = None,
    messages: Annotated[int | None, typer.Option(min=1, help="Caches for each model and length.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Of each timing; 0 leaves speed out.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer messages: for a first look.")] = False,
    json: PointsFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an SVG: KL against bits.", callback=writable)
    ] = None,
    page: PageFile = None,
) -> None:
    """What our codecs and others cost in bits, spoil in predictions, and how fast they are."""
    from kvferry.lab.wire.bench import N_MESSAGES, QUICK_MESSAGES, Settings, default_models

    names, missing = (tuple(models), []) if models else default_models()
    settings = Settings(
        models=names,
        tokens=tuple(tokens) if tokens else None,
        n_messages=messages or (QUICK_MESSAGES if quick else N_MESSAGES),
        codecs=_parts(codecs, ";"),
        peers=_parts(peers, ","),
        repeats=repeats,
    )
    for spec in settings.codecs or ():
        choose_codec(spec)
    result = _run(settings, missing)
    _write(result, json, plot, page)
    _show(result)


@bench.command("fuse")
def bench_fuse(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 170,
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing.")] = 5,
    json: PointsFile = None,
) -> None:
    """Milliseconds and megabytes of our fuser and of the published one (needs 4 GB of memory)."""
    from rich.console import Console

    from kvferry.lab.fusion_speed import Settings, fusion_sheet, run_bench, save_fusion
    from kvferry.lab.wire.tables import rich_table

    result = run_bench(Settings(tokens=tokens, repeats=repeats), Console(stderr=True).print)
    if json:
        save_fusion(result, json)
    Console(highlight=False).print(rich_table(fusion_sheet(result)))


@bench.command("select")
def bench_select(
    tokens: Annotated[int, typer.Option(min=2, help="Of the context.")] = 2048,
    max_bytes: Annotated[int, typer.Option(min=1, help="Cap of the message.")] = 1 << 20,
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing.")] = 3,
    json: PointsFile = None,
) -> None:
    """How long selecting takes beside a prefill of Qwen2.5-0.5B's size (needs 4 GB of memory)."""
    from kvferry.lab.selection_speed import Settings, run_selection, sheet

    points = run_selection(Settings(tokens, max_bytes, repeats))
    show_points(points, [sheet(points)], json)


@bench.command("enrich")
def bench_enrich(
    sender: Annotated[str, typer.Option(help="Has the skill: folder or zoo name.")] = "gemma3",
    receiver: Annotated[str, typer.Option(help="Lacks it.")] = "llama",
    fusers: Annotated[
        str, typer.Option(help="Separated by ','; the controls are the first one's.")
    ] = "gated_residual,c2c",
    facts: Annotated[int, typer.Option(min=2, help="Of each context, an even number.")] = 8,
    items: Annotated[int, typer.Option(min=2, help="Test items of each seed, an even number.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with items of its own.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 600,
    prompts: Annotated[int, typer.Option(min=32, help="That are read for each training.")] = 3200,
    json: PointsFile = None,
) -> None:
    """Whether a sender's cache helps a receiver that has read the same, and what else would explain it."""
    from rich.console import Console

    from kvferry.lab.enrich.bench import run_bench, save_enrich
    from kvferry.lab.enrich.settings import Settings
    from kvferry.lab.enrich.sheets import enrich_sheet
    from kvferry.lab.wire.tables import rich_table

    named = _parts(fusers, ",") or ()
    settings = Settings(sender, receiver, named, facts, items, seeds, steps, prompts)
    result = run_bench(settings, Console(stderr=True, highlight=False).print)
    if json:
        save_enrich(result, json)
    out = Console(highlight=False)
    out.width = max(out.width, _WIDE)
    out.print(rich_table(enrich_sheet(result)))
    for line in result.verdict:
        out.print(line, soft_wrap=True)


@bench.command("pairs")
def bench_pairs(
    pairs: Annotated[
        str | None, typer.Option(help="SENDER-to-RECEIVER, separated by ','. Default: all of the zoo.")
    ] = None,
    items: Annotated[int, typer.Option(min=2, help="Test items, an even number.")] = 200,
    steps: Annotated[int | None, typer.Option(min=0, help="Of training. Default: the recipe's.")] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="For the closed form. Default: the recipe's.")
    ] = None,
    max_mb: Annotated[float, typer.Option(help="Largest size of a map in MB.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides which items are drawn.")] = 0,
    hub: Annotated[
        bool, typer.Option("--hub", help="Instead: three found a hub, gemma3 joins; all pairs of the two.")
    ] = False,
    json: PointsFile = None,
    page: PageFile = None,
) -> None:
    """Every ordered pair of the zoo through a map of a megabyte, fitted in two minutes; with controls."""
    from rich.console import Console

    from kvferry.errors import UsageError
    from kvferry.lab.hub_bench import hub_settings_of, hub_sheet, run_hub
    from kvferry.lab.pairs import line, run_pairs, settings_of, sheet

    if hub and pairs:
        raise UsageError("--pairs with --hub", cure="Leave it out: a hub has pairs of its own")
    console = Console(stderr=True, highlight=False)
    if hub:
        points = run_hub(hub_settings_of(items, steps, texts, seed), lambda point: console.print(line(point)))
    else:
        settings = settings_of(_parts(pairs, ","), items, steps, texts, max_mb, seed)
        points = run_pairs(settings, lambda point: console.print(line(point)))
    table = hub_sheet(points) if hub else sheet(points)
    show_points(points, [table], json, page, _WIDE)


@bench.command("align")
def bench_align(
    pairs: Annotated[
        str | None,
        typer.Option(help="SENDER-to-RECEIVER, separated by ','. Default: four of the shared folder."),
    ] = None,
    passages: Annotated[int, typer.Option(min=2, help="Test passages of each pair.")] = 240,
    texts: Annotated[int, typer.Option(min=1, help="Passages for closed forms.")] = 1000,
    steps: Annotated[int, typer.Option(min=0, help="Of training; 0 for closed forms alone.")] = 300,
    every_projector: Annotated[
        bool, typer.Option("--every-projector", help="Train each kind of projector, not the best alone.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides which passages are drawn.")] = 0,
    json: PointsFile = None,
    page: PageFile = None,
) -> None:
    """How a receiver goes on behind every map: nats per character on stories, with controls."""
    from rich.console import Console

    from kvferry.lab.align.arms import Settings
    from kvferry.lab.align.bench import PAIRS, pair_named, run_bench
    from kvferry.lab.align.sheets import line, sheets

    named = tuple(map(pair_named, _parts(pairs, ",") or ())) or PAIRS
    settings = Settings(passages, texts, steps, seed, every_projector)
    console = Console(stderr=True, highlight=False)
    points = run_bench(named, settings, lambda point: console.print(line(point)))
    show_points(points, sheets(points), json, page, _WIDE)


@bench.command("indexer")
def bench_indexer(
    models: ModelsOption = None,
    heads: Annotated[int, typer.Option(min=1, help="Indexer heads.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Channels of each.")] = 64,
    steps: Annotated[int, typer.Option(min=0, help="Of training.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Decides which texts are drawn.")] = 0,
    json: PointsFile = None,
    page: PageFile = None,
) -> None:
    """How much attention the slots of a fitted lightning indexer hold, beside scores that see no query."""
    from rich.console import Console

    from kvferry.lab.indexer_bench import (
        indexer_line,
        indexer_settings_of,
        indexer_sheet,
        run_indexers,
    )

    console = Console(stderr=True, highlight=False)
    settings = indexer_settings_of(models, heads, dim, steps, seed)
    points = run_indexers(settings, lambda point: console.print(indexer_line(point), soft_wrap=True))
    show_points(points, [indexer_sheet(points)], json, page, _WIDE)


def _parts(text: str | None, separator: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def _run(settings: "Settings", missing: list[str]) -> "WireResult":
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from kvferry.lab.wire.bench import forecast_s, n_parts, run_bench

    console = Console(stderr=True, highlight=False)
    for line in missing:
        console.print(line)
    console.print(f"about {forecast_s(settings) / 60:.0f} minutes")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=n_parts(settings))
        began = ""

        def on_part(what: str) -> None:
            nonlocal began
            progress.update(task, description=what, advance=1)
            where = what.partition(":")[0]
            if where != began and not console.is_terminal:
                console.print(where)
            began = where

        result = run_bench(settings, on_part)
    return replace(result, missing=[*missing, *result.missing])


def _show(result: "WireResult") -> None:
    from rich.console import Console

    from kvferry.lab.wire.sheets import sheets
    from kvferry.lab.wire.tables import rich_table

    console = Console(highlight=False)
    for sheet in sheets(result):
        console.print(rich_table(sheet))
    for line in result.missing:
        console.print(f"left out: {line}")
    console.print(
        f"{len(result.points)} points in {result.seconds:.0f} s, {result.settings.n_messages} messages each"
    )


def _write(result: "WireResult", json: Path | None, plot: Path | None, page: Path | None) -> None:
    from kvferry.lab.ledger import write_file
    from kvferry.lab.picture import as_bytes
    from kvferry.lab.wire.plot import draw
    from kvferry.lab.wire.results import save_wire
    from kvferry.lab.wire.sheets import sheets
    from kvferry.lab.wire.tables import markdown

    if json:
        save_wire(result, json)
    if plot:
        write_file(plot, as_bytes(draw(result), "svg"))
    if page:
        write_file(page, "\n\n".join(map(markdown, sheets(result))).encode() + b"\n")
