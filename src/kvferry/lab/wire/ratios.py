"""What the points say: bits of our families at each baseline's own quality, per model, and medians."""

from dataclasses import dataclass, replace

from kvferry.lab.point import Point
from kvferry.lab.wire.bench import WireResult
from kvferry.lab.wire.curve import Curve, median
from kvferry.lab.wire.entries import family as family_of

INT4 = ("int-g64", "bits=4")
CACHEGEN = ("cachegen", "bins=shipped")
BASELINES = {
    "int4-g64": INT4,
    "centred int4-g64": ("centred-g64", "bits=4"),
    "CacheGen": CACHEGEN,
    "CacheGen, tight tables": ("cachegen-tight", "bins=shipped"),
}
"""Native settings, at whose own KL everything is compared."""

MAX_KL = 0.1
"""A model whose int4-g64 is worse than this is listed, but counts in no median: its baseline is broken."""
KL = 0.03
N_POINTS = 3  # of a curve, at least


@dataclass(frozen=True)
class Measured:
    """A point, as far as ratios need it. `family` is the curve that it lies on."""

    label: str
    codec: str
    spec: str
    family: str
    model: str
    tokens: int
    bits: float
    kl: float
    gap_kl: float | None = None


@dataclass(frozen=True)
class Row:
    """One family on one model at one length. `ratios`: by baseline, None where the curve does not reach its KL;
    `gap_ratio`: to int4-g64, where both are judged by the tokens after a gap."""

    family: str
    model: str
    tokens: int
    natives: dict[str, Measured]
    ratios: dict[str, float | None]
    gap_ratio: float | None
    bits_at_kl: float | None
    counted: bool


def measured(result: WireResult) -> list[Measured]:
    """The points about quality."""
    return [_measured(point) for point in result.points if "suffix_kl" in point.metrics]


def rows(points: list[Measured], counted: list[str]) -> list[Row]:
    """Every family of ours that is a curve, on every model at every length; models in `counted` may count."""
    ours = dict.fromkeys(point.family for point in points if point.label == "ours")
    places = sorted(dict.fromkeys((-point.tokens, point.model) for point in points), key=lambda p: p[0])
    made = (_row(points, family, model, -tokens, counted) for family in ours for tokens, model in places)
    return [row for row in made if row is not None]


def medians(rows: list[Row]) -> Row:
    """Of the rows that count, of one family and length."""
    good = [row for row in rows if row.counted]
    ratios = {name: median(row.ratios.get(name) for row in good) for name in BASELINES}
    return Row(
        rows[0].family,
        f"median of {len(good)}",
        rows[0].tokens,
        {},
        ratios,
        median(row.gap_ratio for row in good),
        median(row.bits_at_kl for row in good),
        counted=bool(good),
    )


def curves(points: list[Measured], model: str, tokens: int) -> dict[str, Curve]:
    """Every family with enough settings, on one model at one length."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in _at(points, model, tokens):
        found.setdefault(point.family, []).append((point.bits, point.kl))
    return {family: Curve.of(pairs) for family, pairs in found.items() if len(pairs) >= N_POINTS}


def natives(points: list[Measured], model: str, tokens: int) -> dict[str, Measured]:
    """The baselines that were measured."""
    found = {(point.codec, point.spec): point for point in _at(points, model, tokens)}
    return {name: found[key] for name, key in BASELINES.items() if key in found}


def _row(points: list[Measured], family: str, model: str, tokens: int, counted: list[str]) -> Row | None:
    curve = curves(points, model, tokens).get(family)
    if curve is None:
        return None
    found = natives(points, model, tokens)
    ratios = {name: curve.ratio_to(native.bits, native.kl) for name, native in found.items()}
    counts = model in counted and "int4-g64" in found and found["int4-g64"].kl < MAX_KL
    gap = _gap_ratio(points, family, model, tokens)
    return Row(family, model, tokens, found, ratios, gap, curve.bits_at(KL), counts)


def _gap_ratio(points: list[Measured], family: str, model: str, tokens: int) -> float | None:
    later = [replace(point, kl=point.gap_kl) for point in points if point.gap_kl is not None]
    curve = curves(later, model, tokens).get(family)
    int4 = natives(later, model, tokens).get("int4-g64")
    return None if curve is None or int4 is None else curve.ratio_to(int4.bits, int4.kl)


def _at(points: list[Measured], model: str, tokens: int) -> list[Measured]:
    return [point for point in points if (point.model, point.tokens) == (model, tokens)]


def _measured(point: Point) -> Measured:
    recipe = point.recipe if isinstance(point.recipe, dict) else {}
    codec, spec = str(recipe["codec"]), str(recipe["spec"])
    bits, kl = point.metrics["bits_per_element"], point.metrics["suffix_kl"]
    return Measured(
        label=point.arm,
        codec=codec,
        spec=spec,
        family=family_of(point.arm, codec, spec),
        model=str(recipe["model"]),
        tokens=int(recipe["tokens"]),
        bits=float(bits or 0.0),
        kl=float(kl or 0.0),
        gap_kl=point.metrics["gap_kl"],
    )
