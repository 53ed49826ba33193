"""What benches of points ask for, and how they show what they found."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.paths import require_files

if TYPE_CHECKING:
    from kvferry.lab.point import Point
    from kvferry.lab.wire.sheets import Sheet


def writable(file: Path | None) -> Path | None:
    """For options that name a result: a place that cannot be written is refused before the minutes of a bench."""
    require_files(file)
    return file


PointsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the points as JSON.", callback=writable)
]
PageFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables in Markdown.", callback=writable)
]


def show_points(
    points: "Sequence[Point]",
    sheets: "Sequence[Sheet]",
    json: Path | None,
    page: Path | None = None,
    least_width: int = 0,
) -> None:
    """To the files that were asked for, and as tables of at least `least_width` columns in the terminal."""
    from rich.console import Console

    from kvferry.lab.ledger import save_points, write_file
    from kvferry.lab.wire.tables import markdown, rich_table

    if json:
        save_points(points, json)
    if page:
        write_file(page, "\n\n".join(map(markdown, sheets)).encode() + b"\n")
    out = Console(highlight=False)
    out.width = max(out.width, least_width)
    for sheet in sheets:
        out.print(rich_table(sheet))
