"""KL against bits per number, one panel per model, in Okabe and Ito's colours."""

from typing import TYPE_CHECKING

from kvferry.errors import MissingExtra
from kvferry.lab.wire.bench import WireResult
from kvferry.lab.wire.ratios import Measured, curves, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
_PEERS = {
    "int-g64": ("#6B6B6B", "o"),
    "centred-g64": ("#6B6B6B", "s"),
    "turboquant": ("#9A9A9A", "^"),
    "cachegen-bins": ("#9A9A9A", "v"),
}
_COLUMNS = 3
_MAX_BITS, _KL_RANGE = 10.0, (1e-5, 1.0)


def draw(result: WireResult) -> "Figure":
    """Every family that is a curve, at the first length that was measured."""
    points = measured(result)
    tokens = points[0].tokens
    points = [point for point in points if point.tokens == tokens]
    models = list(dict.fromkeys(point.model for point in points))
    figure, panels = _canvas(len(models))
    for axes, model in zip(panels, models, strict=False):
        _panel(axes, points, model, tokens)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.suptitle(
        f"What a coded cache of {tokens} tokens costs, and spoils", x=0.01, ha="left", fontsize=12
    )
    return figure


def _canvas(n_panels: int) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report") from None
    n_rows = -(-n_panels // _COLUMNS)
    figure = Figure(figsize=(10, 2.8 * n_rows + 1), layout="constrained")
    panels = figure.subplots(n_rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes in panels[n_panels:]:
        axes.set_axis_off()
    return figure, panels[:n_panels]


def _panel(axes: "Axes", points: list[Measured], model: str, tokens: int) -> None:
    found = curves(points, model, tokens)
    own = dict.fromkeys(point.family for point in points if point.label == "ours")
    ours = [family for family in own if family in found]
    for family, curve in found.items():
        shown = [(bits, max(kl, _KL_RANGE[0])) for bits, kl in curve.points if bits <= _MAX_BITS]
        bits, kls = [x for x, _ in shown], [y for _, y in shown]
        if family in ours:
            axes.plot(bits, kls, color=_OURS[ours.index(family) % len(_OURS)], linewidth=1.8, label=family)
        elif family in _PEERS:
            colour, marker = _PEERS[family]
            axes.plot(bits, kls, color=colour, marker=marker, markersize=3.5, linewidth=0.8, label=family)
    _dress(axes, model)


def _dress(axes: "Axes", model: str) -> None:
    axes.set_title(model, loc="left", fontsize=10)
    axes.set_yscale("log")
    axes.set_ylim(*_KL_RANGE)
    axes.set_xlim(0, _MAX_BITS)
    axes.set_xlabel("bits per number", fontsize=9)
    axes.set_ylabel("KL, nats per token", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
