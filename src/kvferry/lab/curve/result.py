"""What a run of the curve found: its points, crossings, and which families need fewer bytes."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from pydantic import TypeAdapter

from kvferry.lab.curve.caps import FULL, Cap
from kvferry.lab.curve.crossing import BELOW, Crossing, Items, Ratio, Sampled, items_of, ratio, sampled
from kvferry.lab.curve.ledger import Line
from kvferry.lab.curve.task import Task
from kvferry.lab.point import Point


@dataclass(frozen=True)
class Best:
    """The spec of a family that crosses first on dev, and what it does on test; `dev` None: it had no rival."""

    family: str
    spec: str
    dev: Crossing | None
    test: Crossing


@dataclass(frozen=True)
class CurveResult:
    """`points`: of both splits, all seeds. `crossings`: of every arm that has a curve, on test, at `target`."""

    task: str
    metric: str
    target: float
    points: list[Point]
    crossings: dict[str, Crossing]
    best: list[Best]
    ratios: list[Ratio]
    seconds: float


_RESULT = TypeAdapter(CurveResult)
_COLUMNS = (
    "spec",
    "family",
    "cap",
    "split",
    "seed",
    "n",
    "quality",
    "low",
    "high",
    "nll",
    "nll_low",
    "nll_high",
)
_USE = ("slack_median", "share_at_cap", "share_unmet")
_SELECTED = ("kept_mean", "kept_min", "kept_max")
_BYTES = ("message", "request", "link")


def result_of(task: Task, lines: Sequence[Line], seconds: float) -> CurveResult:
    """Choose on dev, report on test."""
    dev, test = (curves_of(lines, split, task.block) for split in ("dev", "test"))
    found = {arm: sampled(items, task.target) for arm, items in test.items()}
    best = list(_best(lines, dev, found, task.target))
    chosen = [one.spec for one in best]
    ratios = [ratio(a, found[a], b, found[b]) for a, b in permutations(chosen, 2)]
    crossings = {arm: one.crossing for arm, one in found.items()}
    points = [line.point for line in lines]
    return CurveResult(str(task), task.metric, task.target, points, crossings, best, ratios, seconds)


def curves_of(lines: Sequence[Line], split: str, block: int) -> dict[str, Items]:
    """By arm; those that were measured under caps."""
    found: dict[str, list[tuple[Cap, int, Line]]] = {}
    for line in lines:
        if line.point.split == split:
            found.setdefault(line.point.arm, []).append((cap_of(line.point), line.point.seed, line))
    return {
        arm: items_of(own, block) for arm, own in found.items() if any(cap is not None for cap, *_ in own)
    }


def cap_of(point: Point) -> Cap:
    cap = said(point, "cap")
    return None if cap == FULL else int(cap)


def said(point: Point, what: str) -> str | int:
    """A word of the recipe; empty where it has none."""
    return point.recipe.get(what, "") if isinstance(point.recipe, dict) else ""


def written(result: CurveResult) -> bytes:
    """As JSON."""
    return _RESULT.dump_json(result, indent=1) + b"\n"


def as_csv(result: CurveResult) -> bytes:
    """A row for each point."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*_COLUMNS, *_USE, *_SELECTED, "encode_ms", *_BYTES, "error", "smallest_cap"])
    table.writerows(_row(point, result.metric) for point in result.points)
    return text.getvalue().encode()


def _row(point: Point, metric: str) -> list[object]:
    metrics, nothing = point.metrics, (None, None)
    quality = [metrics[metric], *(point.ci95[metric] or nothing)]
    nll = [metrics["nll"], *(point.ci95["nll"] or nothing)]
    first = [point.arm, said(point, "family"), said(point, "cap"), point.split, point.seed, point.n]
    # Points of older ledgers do not know what was kept.
    use = [metrics.get(name) for name in (*_USE, *_SELECTED)] + [point.latency_ms.get("encode")]
    sizes = [point.n_bytes.get(name) for name in _BYTES]
    last = [said(point, "error"), said(point, "smallest_cap")]
    return [*first, *quality, *nll, *use, *sizes, *last]


def _best(
    lines: Sequence[Line], dev: dict[str, Items], test: dict[str, Sampled], target: float
) -> Iterator[Best]:
    """One of each family; without a rival on dev it is what it is."""
    family = {line.point.arm: str(said(line.point, "family")) for line in lines if line.point.arm in test}
    for name in dict.fromkeys(family.values()):
        own = [arm for arm in family if family[arm] == name]
        rivals = {arm: sampled(dev[arm], target).crossing for arm in own if arm in dev}
        arm = min(rivals, key=lambda arm: _order(dev[arm], rivals[arm])) if rivals else own[0]
        yield Best(name, arm, rivals.get(arm), test[arm].crossing)


def _order(items: Items, found: Crossing) -> tuple[float, float]:
    """Fewest bytes first; among those that never cross, the best on average."""
    mean = float((items.score.sum(1) / items.weight.sum(1)).mean())
    if found.n_bytes is not None:
        return found.n_bytes, -mean
    return 0.0 if found.why == BELOW else float("inf"), -mean
