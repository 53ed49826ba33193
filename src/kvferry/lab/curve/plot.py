"""Quality against measured bytes: a line for each arm, over all test seeds, in Okabe and Ito's colours."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from kvferry.errors import MissingExtra
from kvferry.lab.curve.result import CurveResult, cap_of, said
from kvferry.lab.point import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^v<>P"
_TEXT, _GRID = "#6B6B6B", "#E4E4E4"


def draw(result: CurveResult) -> "Figure":
    """Text in grey, the receiver alone as a dashed line, the target dotted."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report") from None
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    test = [point for point in result.points if point.split == "test"]
    arms = list(dict.fromkeys(point.arm for point in test))
    caches = [arm for arm in arms if not _is_text(test, arm)]
    for index, arm in enumerate(arms):
        own = [point for point in test if point.arm == arm and point.metrics[result.metric] is not None]
        if arm in caches:
            index = caches.index(arm)
            _curve(axes, own, result.metric, _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
        elif arm == "receiver_only":
            axes.axhline(
                _mean(own, result.metric), color=_TEXT, linestyle="--", linewidth=1, label="receiver alone"
            )
        else:
            _curve(axes, own, result.metric, _TEXT, _MARKERS[index % len(_MARKERS)])
    _dress(axes, result, test[0])
    return figure


def require_matplotlib() -> None:
    """Refuse now what would fail after the measurement."""
    if find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "report")


def _is_text(points: list[Point], arm: str) -> bool:
    return not any(said(point, "selector") for point in points if point.arm == arm)


def _curve(axes: "Axes", points: list[Point], metric: str, colour: str, marker: str) -> None:
    caps = sorted({cap_of(point) for point in points}, key=lambda cap: (cap is None, cap))
    if not caps:
        return
    by_cap = [[point for point in points if cap_of(point) == cap] for cap in caps]
    x = [float(np.mean([p.n_bytes["message"] + p.n_bytes["request"] for p in own])) for own in by_cap]
    y = [_mean(own, metric) for own in by_cap]
    edges = [np.mean([point.ci95[metric] or (0.0, 0.0) for point in own], axis=0) for own in by_cap]
    bars = [[max(0.0, mid - low) for mid, (low, _) in zip(y, edges, strict=True)]]
    bars += [[max(0.0, high - mid) for mid, (_, high) in zip(y, edges, strict=True)]]
    axes.errorbar(
        x,
        y,
        yerr=bars,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.4,
        capsize=2,
        label=points[0].arm,
    )


def _mean(points: list[Point], metric: str) -> float:
    return float(np.mean([point.metrics[metric] or 0.0 for point in points]))


def _dress(axes: "Axes", result: CurveResult, first: Point) -> None:
    axes.set_title(f"{first.sender} reads, {first.receiver} answers: {result.task}", loc="left", fontsize=12)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:g} B" if n < 1e3 else f"{n / 1e3:g} kB")
    axes.axhline(result.target, color=_TEXT, linestyle=":", linewidth=1)
    axes.set_xlabel("measured bytes per item, requests included (log scale)")
    axes.set_ylabel(f"{result.metric.replace('_', ' ')}, {first.n} items per seed, 95 % of one seed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
