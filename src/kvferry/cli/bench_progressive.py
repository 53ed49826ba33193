"""`kvferry bench progressive` and `kvferry bench refine`: messages that can stop anywhere, and going on with them."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import choose_codec
from kvferry.cli.points import PageFile, PointsFile, show_points

if TYPE_CHECKING:
    from kvferry.lab.point import Point

_WIDE = 110


def bench_progressive(
    models: Annotated[
        list[str] | None, typer.Option(help="Folder or zoo name; may be repeated. Default: llama, gemma3.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each context.")] = 96,
    messages: Annotated[int, typer.Option(min=1, help="Of each model.")] = 8,
    json: PointsFile = None,
    page: PageFile = None,
) -> None:
    """What a message that can stop anywhere costs, against one that was made for its length."""
    from kvferry.lab.progressive_bench import Settings, run_progressive, sheet

    settings = Settings(tuple(models) if models else Settings().models, tokens, messages)
    points = run_progressive(settings, _said)
    show_points(points, [sheet(points)], json, page, _WIDE)


def bench_refine(
    model: Annotated[str, typer.Option(help="Sender and receiver: folder or zoo name.")] = "llama",
    codec: Annotated[str, typer.Option(help="What messages are coded in.")] = "progressive(step=-32)",
    items: Annotated[int, typer.Option(min=2, help="Test items, an even number.")] = 512,
    dev: Annotated[int, typer.Option(min=2, help="Items that choose the margin, an even number.")] = 200,
    first_bytes: Annotated[int, typer.Option(min=1, help="Of the first part.")] = 2500,
    more_bytes: Annotated[int, typer.Option(min=1, help="Of each part that is asked for.")] = 1750,
    seed: Annotated[int, typer.Option(min=0, help="Decides which items are drawn.")] = 0,
    json: PointsFile = None,
    page: PageFile = None,
) -> None:
    """Whether sending a part first, and more where the answer is a close call, saves bytes."""
    from kvferry.lab.refine_bench import Settings, run_refine, sheet

    choose_codec(codec)
    settings = Settings(model, codec, items, dev, first_bytes, more_bytes, seed=seed)
    points = run_refine(settings, _said)
    show_points(points, [sheet(points)], json, page, _WIDE)


def _said(point: "Point") -> None:
    from rich.console import Console

    numbers = ", ".join(f"{name} {value:.3f}" for name, value in point.metrics.items() if value is not None)
    Console(stderr=True, highlight=False).print(f"{point.sender}, {point.arm}: {numbers}")
