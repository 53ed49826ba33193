"""The result of the bench as tables for the terminal, and as text for a page."""

from collections.abc import Iterator
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvferry.lab.point import Point
from kvferry.lab.wire.bench import WireResult
from kvferry.lab.wire.entries import brief
from kvferry.lab.wire.ratios import BASELINES, KL, MAX_KL, Row, curves, measured, medians, rows

Cells = tuple[str, ...]
RATIO_COLUMNS = ("", "int4 KL", "/int4", "/centred", "/CacheGen", "/tight", f"bits at {KL:g}")
SPEED_COLUMNS = ("", "bits", "encode", "%", "decode", "%", "peak MB")
RATIO_LEGEND = (
    "/int4: bits over those of int4-g64, at the KL(clean || coded) that int4-g64 has itself, log-interpolated; "
    "/centred: centred int4-g64; /CacheGen: as shipped; /tight: its tables only as wide as each layer needs; "
    f"* in no median: not pretrained, or int4-g64 above {MAX_KL:g} nats"
)
SPEED_LEGEND = (
    "encode, decode: GB/s of the cache in bfloat16, one thread, medians; %: of the memcpy of the same run"
)


def rich_tables(result: WireResult) -> list[Table]:
    """Ratios, bits at one quality, speed."""
    found = measured(result)
    lengths = sorted({point.tokens for point in found}, reverse=True)
    return [
        *(
            _table(f"Ratios, {n} tokens", RATIO_COLUMNS, ratio_cells(result, n), RATIO_LEGEND)
            for n in lengths
        ),
        *(_table(*bits_cells(result, n), f"bits per number at KL {KL:g}") for n in lengths),
        *(
            _table(f"Speed, geometry of {name}", SPEED_COLUMNS, map(speed_cells, points), SPEED_LEGEND)
            for name, points in groupby(speed_points(result), _model)
        ),
    ]


def ratio_cells(result: WireResult, tokens: int) -> Iterator[Cells]:
    """Rows of all families at one length, and below each family the medians."""
    found = [row for row in rows(measured(result), result.counted) if row.tokens == tokens]
    for _, group in groupby(found, lambda row: row.family):
        family = list(group)
        yield (family[0].family, *[""] * (len(RATIO_COLUMNS) - 1))
        yield from map(_ratio_row, [*family, medians(family)])


def bits_cells(result: WireResult, tokens: int) -> tuple[str, Cells, list[Cells]]:
    """Bits at the quality `KL` of everything that is a curve: title, columns, rows."""
    found = [point for point in measured(result) if point.tokens == tokens]
    models = list(dict.fromkeys(point.model for point in found))
    by_model = {model: curves(found, model, tokens) for model in models}
    families = list(dict.fromkeys(family for model in models for family in by_model[model]))
    cells = [
        (family, *(_number(c[family].bits_at(KL), 2) if family in c else "" for c in by_model.values()))
        for family in families
    ]
    return f"Bits at KL {KL:g}, {tokens} tokens", ("family", *models), cells


def speed_points(result: WireResult) -> list[Point]:
    """The points about speed."""
    return [point for point in result.points if "encode_gbps" in point.metrics]


def speed_cells(point: Point) -> Cells:
    """One row of the table of speed."""
    metrics, recipe = point.metrics, point.recipe if isinstance(point.recipe, dict) else {}
    copied = metrics["memcpy_gbps"] or 1.0
    encode, decode = metrics["encode_gbps"] or 0.0, metrics["decode_gbps"] or 0.0
    spec = str(recipe["spec"])
    return (
        brief(spec) if point.arm == "ours" else f"{point.arm}: {recipe['codec']}, {spec}",
        _number(metrics["bits_per_element"], 2),
        f"{encode:.2f}",
        f"{100 * encode / copied:.1f}",
        f"{decode:.2f}",
        f"{100 * decode / copied:.1f}",
        _number(metrics["peak_mb"], 1),
    )


def _ratio_row(row: Row) -> Cells:
    int4 = row.natives.get("int4-g64")
    return (
        f"  {row.model}" if row.counted else f"  {row.model} *",
        _number(int4.kl if int4 else None, 4),
        *(_number(row.ratios.get(name), 2) for name in BASELINES),
        _number(row.bits_at_kl, 2),
    )


def _table(
    title: str, columns: Cells, cells: "Iterator[Cells] | list[Cells] | map[Cells]", legend: str
) -> Table:
    table = Table(title=title, title_justify="left", caption=legend, caption_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def _model(point: Point) -> str:
    return point.sender


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
