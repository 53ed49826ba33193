"""`kvferry bench progressive`: what a message that can stop anywhere costs, against one that was made for its length.

A long `progressive` message is cut at a number of bytes; `ecsq` of the same weighting or profile is coded at all steps.
The excess is how many bytes more the cut one takes than `ecsq` needs, between its steps, for the same measured error.
Both count whole packed messages: the cut one's up to its last whole segment (used), or all (cap) where the writer was
told the cap, in means over messages.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvferry.codec import decode
from kvferry.codec.ecsq import Ecsq
from kvferry.codec.profiles import shipped_profiles
from kvferry.codec.progressive import Progressive
from kvferry.errors import UsageError
from kvferry.kv import stack
from kvferry.lab.felt import felt_error
from kvferry.lab.point import Point
from kvferry.lab.wire.quality import attention_error
from kvferry.lab.wire.sheets import Sheet
from kvferry.lab.wire.subject import Subject, make_subject
from kvferry.models.load import load, public_name
from kvferry.wire import Frame, pack, unpack_prefix

LEAST_BYTES = 4000
"""Shorter messages are measured too, but do not count."""
MEASURES = ("felt", "attention")
_N_CUTS, _EVERY = 16, 16
_LEGEND = (
    "excess: bytes more than ecsq needs for the same error, largest and mean over cuts of {least:,} bytes and more; "
    "felt: mean square error as the codec weighs it; attention: error of what attention reads; used: up to the last "
    "whole segment of a cut message; cap: of a message made within a cap"
)


@dataclass(frozen=True)
class Settings:
    """What is measured. `coarsest`: where the steps of `ecsq` end, in 64ths of an octave above the finest."""

    models: tuple[str, ...] = ("llama", "gemma3")
    tokens: int = 96
    n_messages: int = 8
    n_layers: tuple[int, ...] = (2, 3)
    step: int = -96
    profile_step: int = -32
    coarsest: int = 352


@dataclass(frozen=True)
class Curve:
    """Mean bytes and mean errors, from the coarsest on."""

    n_bytes: tuple[float, ...]
    errors: dict[str, tuple[float, ...]]

    def bytes_for(self, measure: str, error: float) -> float:
        """What it takes on average, between the points; NaN beyond them."""
        known = np.log(np.maximum(self.errors[measure], 1e-12))[::-1]
        return float(
            np.exp(np.interp(np.log(max(error, 1e-12)), known, np.log(self.n_bytes)[::-1], np.nan, np.nan))
        )


def run_progressive(
    settings: Settings, on_point: Callable[[Point], None] = lambda point: None
) -> list[Point]:
    """All models; with a profile where the package has one."""
    points = []
    for name in settings.models:
        subject = make_subject(load(name), settings.tokens, settings.n_messages)
        for point in _points(subject, name, settings):
            on_point(point)
            points.append(point)
    return points


def _points(subject: Subject, name: str, settings: Settings) -> Iterator[Point]:
    kinds = [Ecsq(settings.step)]
    if name in shipped_profiles():
        kinds.append(Ecsq(settings.profile_step, profile=name))
    for codec in kinds:
        reference = ecsq_curve(subject, codec, settings.coarsest)
        for n_layers in settings.n_layers:
            layered = Progressive(codec.step, profile=codec.profile, n_layers=n_layers)
            for way, curve in (
                ("used", cut_curve(subject, layered)),
                ("cap", capped_curve(subject, layered)),
            ):
                yield _point(subject, layered, way, excess(curve, reference), settings)


def ecsq_curve(subject: Subject, codec: Ecsq, coarsest: int) -> Curve:
    """Every quarter octave from the codec's own step on."""
    steps = range(codec.step + coarsest, codec.step - 1, -_EVERY)
    codecs = [replace(codec, step=step) for step in steps]
    return _curve(subject, codec, [[one.encode(kv) for kv in subject.content.sequences()] for one in codecs])


def cut_curve(subject: Subject, codec: Progressive) -> Curve:
    """One message of each cache, cut at lengths between those of its coarsest layer and of all."""
    data = [pack(codec.encode(kv)) for kv in subject.content.sequences()]
    least = max(codec.smallest(kv) for kv in subject.content.sequences())
    prefixes = [[unpack_prefix(one[:cap]) for one in data] for cap in _caps(least, min(map(len, data)))]
    n_bytes = [float(np.mean([prefix.n_bytes_used for prefix in row])) for row in prefixes]
    return _curve(subject, codec, [[prefix.frame for prefix in row] for row in prefixes], n_bytes)


def capped_curve(subject: Subject, codec: Progressive) -> Curve:
    """Messages made within caps, which count whole."""
    caches = list(subject.content.sequences())
    sizes = [len(pack(codec.encode(kv))) for kv in caches]
    caps = _caps(max(map(codec.smallest, caches)), min(sizes))
    return _curve(subject, codec, [[codec.encode(kv, max_bytes=cap) for kv in caches] for cap in caps], caps)


def excess(curve: Curve, reference: Curve) -> dict[str, list[tuple[float, float]]]:
    """By measure, bytes and the share by which they are more than the reference needs."""
    return {
        name: [
            (size, size / needed - 1)
            for size, error in zip(curve.n_bytes, errors, strict=True)
            if np.isfinite(needed := reference.bytes_for(name, error))
        ]
        for name, errors in curve.errors.items()
    }


def _caps(least: int, most: int) -> list[int]:
    if most <= least:
        raise UsageError(f"messages of {most} bytes", cure="Use more tokens or a finer step")
    return [round(cap) for cap in np.geomspace(least, most, _N_CUTS)]


def _curve(
    subject: Subject, codec: Ecsq, frames: Sequence[Sequence[Frame]], n_bytes: Sequence[float] | None = None
) -> Curve:
    errors = [_errors(subject, codec, row) for row in frames]
    sizes = n_bytes or [float(np.mean([len(pack(frame)) for frame in row])) for row in frames]
    return Curve(tuple(sizes), dict(zip(MEASURES, map(tuple, zip(*errors, strict=True)), strict=True)))


def _errors(subject: Subject, codec: Ecsq, frames: Sequence[Frame]) -> tuple[float, float]:
    clean = subject.content
    caches = [decode(frame, clean.geometry) for frame in frames]
    felt = [felt_error(codec, kv, came) for kv, came in zip(clean.sequences(), caches, strict=True)]
    return float(np.mean(felt)), attention_error(subject, replace(stack(caches), positions=clean.positions))


def _point(
    subject: Subject,
    codec: Progressive,
    way: str,
    found: dict[str, list[tuple[float, float]]],
    settings: Settings,
) -> Point:
    metrics: dict[str, float | None] = {}
    for name, pairs in found.items():
        shares = [share for size, share in pairs if size >= LEAST_BYTES]
        metrics[f"{name}_max"] = max(shares) if shares else None
        metrics[f"{name}_mean"] = float(np.mean(shares)) if shares else None
    model = subject.model
    recipe: dict[str, str | int] = {
        "codec": codec.brief(),
        "weights": "profile" if codec.profile_hash else "own",
        "n_layers": codec.n_layers,
        "tokens": settings.tokens,
    }
    sizes = [size for size, _ in found[MEASURES[0]]]
    return Point(
        arm=way,
        recipe=recipe,
        sender=public_name(model.name),
        receiver=public_name(model.name),
        task="held-out text",
        split="test",
        n=subject.n_messages,
        seed=0,
        metrics=metrics,
        n_bytes={"least": min(sizes, default=0.0), "most": max(sizes, default=0.0)},
    )


def sheet(points: Sequence[Point]) -> Sheet:
    """A row for each setting."""
    columns = ("", "weights", "layers", "bytes", "felt max", "mean", "attention max", "mean")
    return Sheet(
        "Messages that can stop anywhere: excess bytes",
        columns,
        tuple(map(_row, points)),
        _LEGEND.format(least=LEAST_BYTES),
    )


def _row(point: Point) -> tuple[str, ...]:
    recipe = point.recipe if isinstance(point.recipe, dict) else {}
    cells = (point.metrics[f"{name}_{which}"] for name in MEASURES for which in ("max", "mean"))
    return (
        f"{point.sender}, {point.arm}",
        str(recipe["weights"]),
        str(recipe["n_layers"]),
        f"{point.n_bytes['least']:.0f} to {point.n_bytes['most']:.0f}",
        *("-" if cell is None else f"{100 * cell:.1f} %" for cell in cells),
    )
