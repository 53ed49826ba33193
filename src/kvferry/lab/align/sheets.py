"""The points of the aligner bench as lines and tables."""

from collections.abc import Sequence
from itertools import groupby

from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet

_HEAD = (
    "map",
    "kind",
    "codec",
    "nats/char",
    "gap closed",
    "under table",
    "with tail",
    "R2 K, V",
    "cosine",
    "MB",
    "fit s",
)

_LEGEND = (
    "Gap closed: of that between no prefix and the whole text, 95 % over passages. Under table: nats per character "
    "fewer than the table of tokens, paired, 95 %. With tail: the last characters as text, the rest mapped."
)


def line(point: Point) -> str:
    """One point while the bench runs."""
    recipe, metrics = point.recipe, point.metrics
    if isinstance(recipe, str):
        return recipe
    what = ", ".join(str(value) for value in recipe.values())
    numbers = f"{_n(metrics['nll_per_char'], 4)} ({_n(metrics['gap_closed'], 3)})"
    return f"{point.sender} to {point.receiver}: {what}: {numbers}"


def sheets(points: Sequence[Point]) -> list[Sheet]:
    """A table for each pair and grid."""
    found = []
    for title, rows in groupby(points, key=_title):
        held = list(rows)
        tails = {_key(point): point for point in held if _recipe(point).get("text_chars")}
        body = [_row(point, tails) for point in held if not _recipe(point).get("text_chars")]
        found.append(Sheet(title, _HEAD, tuple(body), _LEGEND))
    return found


def _title(point: Point) -> str:
    grid = _recipe(point)["grid"]
    where = "text" if grid == "none" else f"{grid}'s grid"
    return f"{point.sender} to {point.receiver}, {where}, {point.n} passages"


def _row(point: Point, tails: dict[tuple[object, ...], Point]) -> tuple[str, ...]:
    recipe, metrics, ci95 = _recipe(point), point.metrics, point.ci95
    tail = tails.get(_key(point))
    low, high = ci95["gap_closed"] or (0.0, 0.0)
    under = ci95.get("nats_under_table")
    r2 = [_n(metrics.get(name), 2) for name in ("r2_k", "r2_v")]
    return (
        str(recipe["aligner"]),
        str(recipe.get("kind", "")),
        str(recipe["codec"]).replace(", zstd=0", ""),
        _n(metrics["nll_per_char"], 4),
        f"{_n(metrics['gap_closed'], 3)} ({low:.3f} to {high:.3f})",
        "" if under is None else f"{_n(metrics['nats_under_table'], 4)} ({under[0]:.4f} to {under[1]:.4f})",
        "" if tail is None else f"{_n(tail.metrics['nll_per_char'], 4)}, {_n(tail.metrics['gap_closed'], 3)}",
        ", ".join(r2) if any(r2) else "",
        _n(metrics.get("attention_cosine"), 2),
        _n(metrics.get("mb"), 2),
        _n(metrics.get("fit_seconds"), 0),
    )


def _key(point: Point) -> tuple[object, ...]:
    recipe = _recipe(point)
    return recipe["aligner"], recipe["codec"], recipe["grid"], recipe.get("kind")


def _recipe(point: Point) -> dict[str, str | int]:
    return {} if isinstance(point.recipe, str) else point.recipe


def _n(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
