"""Sheets where they are read: on a terminal, on a page of the documentation."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvferry.lab.wire.sheets import Cells, Sheet


def rich_table(sheet: Sheet) -> Table:
    """For the terminal."""
    table = Table(
        title=sheet.title,
        title_justify="left",
        caption=sheet.legend,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in sheet.cells:
        table.add_row(*row)
    return table


def markdown(sheet: Sheet) -> str:
    """For a page.

    >>> print(markdown(Sheet("Speed", ("", "bits"), (("  raw", "16.00"),), "all of it")))
    ### Speed
    <BLANKLINE>
    |  | bits |
    |---|---:|
    | raw | 16.00 |
    <BLANKLINE>
    all of it
    """
    rule = "|".join(["", "---", *["---:"] * (len(sheet.columns) - 1), ""])
    rows = "\n".join(map(_line, sheet.cells))
    return f"### {sheet.title}\n\n{_line(sheet.columns)}\n{rule}\n{rows}\n\n{sheet.legend}"


def _line(cells: Cells) -> str:
    return f"| {' | '.join(cell.strip().replace('*', chr(92) + '*') for cell in cells)} |"
