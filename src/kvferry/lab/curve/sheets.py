"""The curve as tables: quality by cap, the best of each family, and who needs fewer bytes."""

from collections.abc import Sequence

from kvferry.lab.curve.crossing import Crossing, Ratio
from kvferry.lab.curve.result import Best, CurveResult, cap_of, said
from kvferry.lab.curve.run import N_TIMED, Forecast
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet


def sheets(result: CurveResult) -> list[Sheet]:
    """All that there is to see."""
    test = [point for point in result.points if point.split == "test"]
    texts = [point for point in test if not said(point, "selector")]
    caches = [point for point in test if said(point, "selector")]
    curves = [curve_sheet(result, points) for points in (texts, caches)]
    return [*curves, best_sheet(result), ratio_sheet(result)]


def curve_sheet(result: CurveResult, test: list[Point]) -> Sheet:
    """A row for each arm: quality over all seeds at each cap, and mean bytes."""
    caps = sorted({cap_of(point) for point in test}, key=lambda cap: (cap is None, cap))
    names = ["full" if cap is None else f"{cap:,}" for cap in caps]
    rows = [
        (arm, *(_cell([p for p in test if p.arm == arm and cap_of(p) == cap], result.metric) for cap in caps))
        for arm in dict.fromkeys(point.arm for point in test)
    ]
    legend = (
        f"{result.metric} and mean bytes of a message, request included; –: no item fits; "
        "*: some items do not, and count as wrong"
    )
    return Sheet(_title(result.task, test), ("", *names), tuple(rows), legend)


def best_sheet(result: CurveResult) -> Sheet:
    """A row for each family."""
    rows = tuple(map(_best_row, result.best))
    legend = (
        f"bytes at which {result.metric} crosses {result.target:g}: chosen on dev, reported on test (95 %)"
    )
    return Sheet("The best of each family", ("family", "spec", "dev", "test"), rows, legend)


def ratio_sheet(result: CurveResult) -> Sheet:
    """Bytes of the row over bytes of the column."""
    families = [best.family for best in result.best]
    specs = {best.family: best.spec for best in result.best}
    found = {(one.a, one.b): one for one in result.ratios}
    rows = tuple(
        (a, *("" if a == b else _ratio_cell(found[specs[a], specs[b]]) for b in families)) for a in families
    )
    legend = "bytes of the row over bytes of the column, where both cross; 95 % over seeds and items, paired"
    return Sheet(f"Bytes at {result.metric} {result.target:g}", ("", *families), rows, legend)


def forecast_sheet(found: Sequence[Forecast]) -> Sheet:
    """What each arm will take."""
    rows = tuple(
        (one.arm, f"{one.batch_s:.2f}", f"{one.batch_s * 500 / N_TIMED:.0f}", f"{one.seconds / 60:.1f}")
        for one in found
    )
    columns = ("", f"s for {N_TIMED} items", "s for 500", "minutes left")
    return Sheet("Forecast", columns, rows, "mean over the tightest, a middle and the widest cap")


def _title(task: str, points: list[Point]) -> str:
    first, seeds = points[0], len({point.seed for point in points})
    return f"{first.sender} reads, {first.receiver} answers: {task}, {seeds} x {first.n} items"


def _cell(points: list[Point], metric: str) -> str:
    if not points:
        return ""
    qualities = [point.metrics[metric] for point in points]
    if all(quality is None for quality in qualities):
        return "–" if said(points[0], "error") == "BudgetTooSmall" else "refused"
    mean = sum(quality or 0.0 for quality in qualities) / len(qualities)
    n_bytes = sum(point.n_bytes["message"] + point.n_bytes["request"] for point in points) / len(points)
    unmet = any(point.metrics["share_unmet"] for point in points)
    return f"{mean:.3f}{'*' if unmet else ''} {n_bytes:,.0f}"


def _best_row(best: Best) -> tuple[str, ...]:
    return (
        best.family,
        best.spec,
        "" if best.dev is None else _crossing_cell(best.dev),
        _crossing_cell(best.test),
    )


def _crossing_cell(found: Crossing) -> str:
    if found.n_bytes is None:
        return found.why
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:,.0f} to {found.ci95[1]:,.0f})"
    return f"{found.n_bytes:,.0f}{interval}"


def _ratio_cell(found: Ratio) -> str:
    if found.ratio is None:
        return found.verdict
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"
    return f"{found.ratio:.2f}{interval}{', undecided' if found.verdict == 'undecided' else ''}"
