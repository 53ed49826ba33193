"""The result as a table for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvferry.lab.demo import DemoResult
from kvferry.lab.point import Point
from kvferry.lab.summary import meaning, until_first_token

COLUMNS = ("arm", "right", "95 %", "follows", "message", "link", "ms", "what it is")
LEGEND = (
    "right, follows: share of answers that are right for the item, for the text that the message was made of; "
    "message, link: bytes per item; ms: the receiver's work until its first token"
)


def cells(row: Point) -> tuple[str, ...]:
    """One row as text; the same in the terminal and in the report."""
    low, high = row.ci95["accuracy"] or (0.0, 1.0)
    follows = row.metrics["follows_payload"]
    return (
        row.arm,
        f"{row.accuracy:.3f}",
        f"{low:.3f}–{high:.3f}",
        "" if follows is None else f"{follows:.3f}",
        f"{row.n_bytes['message']:,.0f}",
        f"{row.n_bytes['link']:,.0f}",
        f"{until_first_token(row):.1f}" if row.latency_ms else "",
        meaning(row.arm),
    )


def rich_table(result: DemoResult) -> Table:
    """Narrow enough for 80 columns; what the arms are is left to the report."""
    first = result.rows[0]
    title = f"{first.sender} reads, {first.receiver} answers: {first.n} items of {first.task}"
    table = Table(title=title, title_justify="left", caption=LEGEND, caption_justify="left", box=SIMPLE_HEAD)
    for column in COLUMNS[:-1]:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(*cells(row)[:-1])
    return table
