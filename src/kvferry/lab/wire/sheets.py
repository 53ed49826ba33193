"""What the bench found, as sheets of plain cells: ratios, bits at one quality, native settings, speed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from kvferry.lab.point import Point
from kvferry.lab.wire.bench import WireResult
from kvferry.lab.wire.curve import median
from kvferry.lab.wire.entries import brief
from kvferry.lab.wire.ratios import BASELINES, KL, MAX_KL, Measured, Row, curves, measured, medians, rows

Cells = tuple[str, ...]

_RATIO_COLUMNS = ("", "int4 KL", "/int4", "gap", "/centred", "/CacheGen", "/tight", f"bits at {KL:g}")
_RATIO_LEGEND = (
    "/int4: bits over those of int4-g64, at the KL(clean || coded) that int4-g64 has itself, log-interpolated; "
    "gap: the same, judged by tokens after a gap; /centred: centred int4-g64; /CacheGen: as shipped; "
    "/tight: CacheGen with tables only as wide as each layer needs; "
    f"* in no median: not pretrained, or int4-g64 above {MAX_KL:g} nats"
)
_SPEED_COLUMNS = ("", "bits", "encode", "%", "decode", "%", "peak MB")
_SPEED_LEGEND = (
    "encode, decode: GB/s of the cache in bfloat16, one thread, medians; %: of the memcpy of the same run"
)
_CURVE_ONLY = ("ecsq", "cachegen-bins")  # settings that nobody uses as such


@dataclass(frozen=True)
class Sheet:
    """A table, before it is known where it will stand."""

    title: str
    columns: Cells
    cells: tuple[Cells, ...]
    legend: str


def sheets(result: WireResult) -> list[Sheet]:
    """All that there is to see."""
    points = measured(result)
    lengths = sorted({point.tokens for point in points}, reverse=True)
    ratios = [ratio_sheet(rows(points, result.counted), tokens) for tokens in lengths]
    halves = [[p for p in points if (p.model in result.counted) == counted] for counted in (True, False)]
    bits = [bits_sheet(half, tokens) for tokens in lengths for half in halves]
    natives = [native_sheet(half, points[0].tokens) for half in halves]
    return [*ratios, *(sheet for sheet in (*bits, *natives) if sheet.cells), *speed_sheets(result)]


def ratio_sheet(found: list[Row], tokens: int) -> Sheet:
    """All families at one length, the medians below each."""
    here = [row for row in found if row.tokens == tokens]
    families = [list(group) for _, group in groupby(here, lambda row: row.family)]
    cells = [line for family in families for line in _family_cells(family)]
    return Sheet(f"Ratios, {tokens} tokens", _RATIO_COLUMNS, tuple(cells), _RATIO_LEGEND)


def bits_sheet(points: list[Measured], tokens: int) -> Sheet:
    """Bits at the quality `KL` of everything that is a curve."""
    models = _models(points, tokens)
    by_model = {model: curves(points, model, tokens) for model in models}
    families = dict.fromkeys(family for model in models for family in by_model[model])
    cells = [
        (family, *(_number(c[family].bits_at(KL), 2) if family in c else "" for c in by_model.values()))
        for family in families
    ]
    legend = f"bits per number at KL {KL:g}; –: the curve ends before"
    return Sheet(f"Bits at KL {KL:g}, {tokens} tokens", ("", *models), tuple(cells), legend)


def native_sheet(points: list[Measured], tokens: int) -> Sheet:
    """Settings as they are used: bits, and the KL on each model."""
    here = [point for point in points if point.tokens == tokens and point.codec not in _CURVE_ONLY]
    models = _models(points, tokens)
    settings = dict.fromkeys((point.label, point.codec, point.spec) for point in here)
    cells = [_native_cells(here, setting, models) for setting in settings]
    legend = "bits: median over models; then KL(clean || coded) in nats per token"
    return Sheet(f"Native settings, {tokens} tokens", ("", "bits", *models), tuple(cells), legend)


def speed_sheets(result: WireResult) -> list[Sheet]:
    """One for each geometry."""
    points = [point for point in result.points if "encode_gbps" in point.metrics]
    return [
        Sheet(f"Speed, geometry of {name}", _SPEED_COLUMNS, tuple(map(_speed_cells, group)), _SPEED_LEGEND)
        for name, group in groupby(points, lambda point: point.sender)
    ]


def _family_cells(family: list[Row]) -> Iterator[Cells]:
    yield (family[0].family, *[""] * (len(_RATIO_COLUMNS) - 1))
    yield from map(_ratio_cells, [*family, medians(family)])


def _ratio_cells(row: Row) -> Cells:
    first, *others = BASELINES
    int4 = row.natives.get(first)
    return (
        f"  {row.model}" if row.counted else f"  {row.model} *",
        f"{int4.kl:.2g}" if int4 else "–",
        _number(row.ratios.get(first), 2),
        _number(row.gap_ratio, 2),
        *(_number(row.ratios.get(name), 2) for name in others),
        _number(row.bits_at_kl, 2),
    )


def _native_cells(points: list[Measured], setting: tuple[str, str, str], models: list[str]) -> Cells:
    own = {point.model: point for point in points if (point.label, point.codec, point.spec) == setting}
    bits = median(point.bits for point in own.values())
    kls = (f"{own[model].kl:.2g}" if model in own else "" for model in models)
    return (_name(*setting), _number(bits, 2), *kls)


def _speed_cells(point: Point) -> Cells:
    metrics, recipe = point.metrics, point.recipe if isinstance(point.recipe, dict) else {}
    copied = metrics["memcpy_gbps"] or 1.0
    encode, decode = metrics["encode_gbps"] or 0.0, metrics["decode_gbps"] or 0.0
    return (
        _name(point.arm, str(recipe["codec"]), str(recipe["spec"])),
        _number(metrics["bits_per_element"], 2),
        f"{encode:.2f}",
        f"{100 * encode / copied:.1f}",
        f"{decode:.2f}",
        f"{100 * decode / copied:.1f}",
        _number(metrics["peak_mb"], 1),
    )


def _name(label: str, codec: str, spec: str) -> str:
    return brief(spec) if label == "ours" else f"{label}: {codec}, {spec}"


def _models(points: list[Measured], tokens: int) -> list[str]:
    return list(dict.fromkeys(point.model for point in points if point.tokens == tokens))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
