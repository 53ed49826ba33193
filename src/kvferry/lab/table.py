"""The result as a table for the terminal."""

from rich.table import Table

from kvferry.lab.demo import DemoResult
from kvferry.lab.point import Point
from kvferry.lab.summary import meaning, until_first_token

COLUMNS = (
    "arm",
    "accuracy",
    "95 % interval",
    "follows",
    "message B",
    "link B",
    "ms to 1st token",
    "what it is",
)


def cells(row: Point) -> tuple[str, ...]:
    """One row as text; the same in the terminal and in the report."""
    low, high = row.ci95["accuracy"] or (0.0, 1.0)
    follows = row.metrics["follows_payload"]
    return (
        row.arm,
        f"{row.accuracy:.3f}",
        f"{low:.3f} – {high:.3f}",
        "" if follows is None else f"{follows:.3f}",
        f"{row.n_bytes['message']:,.0f}",
        f"{row.n_bytes['link']:,.0f}",
        f"{until_first_token(row):.1f}" if row.latency_ms else "",
        meaning(row.arm),
    )


def rich_table(result: DemoResult) -> Table:
    first = result.rows[0]
    title = f"{first.sender} reads, {first.receiver} answers: {first.n} items of {first.task}"
    table = Table(title=title, title_justify="left", caption=f"guessing by type: {result.chance:.3f}")
    for column in COLUMNS:
        number = column not in ("arm", "what it is")
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "what it is")
    for row in result.rows:
        table.add_row(*cells(row))
    return table
