"""What the bench of enrichment found, as a table of plain cells."""

from kvferry.lab.enrich.bench import EnrichResult
from kvferry.lab.enrich.verdict import Comparison
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet

_COLUMNS = ("", "right", "95 %", "by seed", "fused less this", "95 %", "ms", "MB", "fit s")
_MEANINGS = {
    "receiver_only": "the receiver alone",
    "sender_only": "the sender alone",
    "text_to_text": "told the sender's answer",
    "answer_passed_on": "told it, and nothing else",
    "closed_gates": "gates closed",
    "zeroed": "zeros arrive",
    "mean": "the mean cache arrives",
    "twin": "another context arrives",
    "same_model": "the receiver as its own sender",
    "context_only": "the sender has not read the question",
}
_LEGEND = (
    "right: exact answers; 95 %: seeds drawn, then items within; ms: fusing one prompt; MB: the fuser in fp32; "
    "another context: in brackets how often its answer is given"
)


def enrich_sheet(result: EnrichResult) -> Sheet:
    """An arm a line, the best first."""
    settings, found = result.settings, {one.b: one for one in result.comparisons}
    n_items = settings.n_items * settings.seeds
    title = f"{settings.receiver} enriched by {settings.sender}: two hops, {settings.n_facts} facts, n = {n_items}"
    ordered = sorted(result.points, key=lambda point: -point.accuracy)
    return Sheet(title, _COLUMNS, tuple(_cells(point, found.get(point.arm)) for point in ordered), _LEGEND)


def _cells(point: Point, beside: Comparison | None) -> tuple[str, ...]:
    metrics = point.metrics
    by_seed = [f"{value or 0:.2f}" for name, value in metrics.items() if name.startswith("accuracy_seed")]
    follows = metrics["follows_payload"]
    return (
        _MEANINGS.get(point.arm, point.arm),
        f"{point.accuracy:.3f}" + (f" ({follows:.3f})" if follows is not None else ""),
        _edges(point.ci95["accuracy"]),
        ", ".join(by_seed),
        f"{beside.difference:+.3f}" if beside else "",
        _edges(beside.ci95) if beside else "",
        f"{point.latency_ms['fuse']:.1f}" if point.latency_ms else "",
        f"{metrics['mb_float32']:.2f}" if metrics.get("mb_float32") else "",
        f"{metrics['fit_seconds']:.0f}" if metrics.get("fit_seconds") else "",
    )


def _edges(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
