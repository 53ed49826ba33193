"""A demo's result as one HTML page that needs nothing else, and its picture as files."""

from importlib.resources import files
from pathlib import Path

from kvferry.errors import MissingExtra
from kvferry.lab.demo import DemoResult
from kvferry.lab.ledger import save_result, write_file
from kvferry.lab.picture import as_bytes, draw
from kvferry.lab.summary import controls, summary
from kvferry.lab.table import COLUMNS, LEGEND, cells


def write_report(result: DemoResult, folder: Path) -> Path:
    """Write report.html, picture.svg, picture.png and result.json into a folder; returns the page."""
    figure = draw(result)
    svg = as_bytes(figure, "svg")
    write_file(folder / "picture.svg", svg)
    write_file(folder / "picture.png", as_bytes(figure, "png"))
    save_result(result, folder / "result.json")
    page = folder / "report.html"
    write_file(page, _page(result, svg.decode()).encode())
    return page


def require_tools() -> None:
    """Refuse now what would fail after the evaluation."""
    for package in ("jinja2", "matplotlib"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra(package, "report") from None


def _page(result: DemoResult, svg: str) -> str:
    import jinja2

    source = files("kvferry.lab").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(
        first=result.rows[0],
        result=result,
        columns=COLUMNS,
        legend=LEGEND,
        rows=[cells(row) for row in result.rows],
        timed=[row for row in result.rows if row.latency_ms],
        summary=summary(result),
        controls=controls(result),
        svg=svg[svg.index("<svg") :],
    )
