"""Accuracy against bytes, as SVG and PNG. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry.errors import MissingExtra
from kvferry.lab.arms import family_of
from kvferry.lab.demo import DemoResult
from kvferry.lab.point import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#6B6B6B"
_LABELS = {  # arm -> its words, and where they stand: points to the right and up, horizontal alignment
    "receiver_only": ("receiver alone", (0, -14), "center"),
    "text_full": ("whole text", (0, 9), "center"),
    "text_zstd": ("zstd", (-8, 0), "right"),
    "text_at_16": ("last 16 B", (-9, 4), "right"),
    "text_at_32": ("last 32 B", (9, -3), "left"),
    "text_at_64": ("last 64 B", (9, -1), "left"),
    "kv_raw": ("16 bit", (0, -16), "center"),
    "kv_int8": ("int8", (0, -16), "center"),
    "kv_int4": ("int4", (0, -16), "center"),
    "kv_ecsq_-64": ("ecsq", (0, -16), "center"),
    "kv_profile_104": ("with profile", (0, 13), "center"),
    "kv_zeroed": ("zeros", (9, -8), "left"),
    "kv_mean": ("mean cache", (9, 17), "left"),
    "kv_twin": ("twin's cache", (-9, -8), "right"),
}


def draw(result: DemoResult) -> "Figure":
    """Text and caches as curves with 95 % intervals, controls hollow, chance dashed."""
    figure, axes = _canvas()
    first = result.rows[0]
    _curve(axes, _of(result, "text"), _BLUE, "o", f"{first.receiver} reads text")
    _curve(
        axes, _of(result, "cache"), _VERMILLION, "s", f"{first.receiver} takes over {first.sender}'s cache"
    )
    _controls(axes, _of(result, "control"))
    axes.axhline(result.chance, color=_GREY, linestyle="--", linewidth=1, label="guessing by type")
    for row in result.rows:
        _label(axes, row)
    _dress(axes, first)
    return figure


def as_bytes(figure: "Figure", kind: str) -> bytes:
    """The picture as "svg" or "png"; the same bytes for the same picture."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "kvferry", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _of(result: DemoResult, family: str) -> list[Point]:
    rows = [row for row in result.rows if family_of(row.arm) == family]
    return sorted(rows, key=lambda row: row.n_bytes["message"])


def _canvas() -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report") from None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    return figure, figure.subplots()


def _curve(axes: "Axes", rows: Sequence[Point], colour: str, marker: str, label: str) -> None:
    axes.errorbar(
        *_xy(rows),
        yerr=_bars(rows),
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.6,
        capsize=2,
        label=label,
    )


def _controls(axes: "Axes", rows: Sequence[Point]) -> None:
    axes.errorbar(
        *_xy(rows), yerr=_bars(rows), color=_GREY, marker="D", markersize=6, markerfacecolor="white", linestyle="none",
        capsize=2, label="controls",
    )  # fmt: skip


def _xy(rows: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [row.n_bytes["message"] for row in rows], [row.accuracy for row in rows]


def _bars(rows: Sequence[Point]) -> tuple[list[float], list[float]]:
    """How far the interval reaches below and above."""
    edges = [(row.accuracy, row.ci95["accuracy"] or (row.accuracy, row.accuracy)) for row in rows]
    return [max(0.0, mid - low) for mid, (low, _) in edges], [
        max(0.0, high - mid) for mid, (_, high) in edges
    ]


def _label(axes: "Axes", row: Point) -> None:
    if row.arm not in _LABELS:
        return
    words, offset, side = _LABELS[row.arm]
    colour = {"text": _BLUE, "cache": _VERMILLION}.get(family_of(row.arm) or "control", _GREY)
    place = (row.n_bytes["message"], row.accuracy)
    axes.annotate(
        words, place, offset, textcoords="offset points", ha=side, va="center", color=colour, fontsize=8.5
    )


def _dress(axes: "Axes", first: Point) -> None:
    axes.set_title(f"{first.sender} reads, {first.receiver} answers", loc="left", fontsize=12)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda n_bytes, _: _size(n_bytes))
    axes.set_ylim(-0.09, 1.1)
    axes.margins(x=0.08)
    axes.set_xlabel("size of one message (log scale)")
    axes.set_ylabel(f"accuracy, {first.n} items, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="center", bbox_to_anchor=(0.52, 0.5))


def _size(n_bytes: float) -> str:
    """
    >>> _size(100), _size(10_000)
    ('100 B', '10 kB')
    """
    return f"{n_bytes:g} B" if n_bytes < 1e3 else f"{n_bytes / 1e3:g} kB"
