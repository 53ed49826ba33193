"""The whole bench: every entry on every subject, then speed; one process, one thread, everything side by side."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from kvferry.errors import UsageError
from kvferry.lab.point import Point
from kvferry.lab.wire.entries import STEPS, Entry, default_specs, own_entries, peer_entries, profile_entries
from kvferry.lab.wire.peers.table import installed_peers
from kvferry.lab.wire.profiles import profile_name
from kvferry.lab.wire.quality import measure
from kvferry.lab.wire.speed import (
    GEOMETRIES,
    N_TOKENS,
    SPECS,
    Timed,
    measure_speed,
    one_thread,
    timed_codec,
    timed_peer,
)
from kvferry.lab.wire.subject import N_SUFFIX, Subject, fits, make_subject
from kvferry.lab.wire.texts import SHARED, shared_models
from kvferry.models.load import Model, load, public_name
from kvferry.models.zoo.catalog import names as zoo_names

LENGTHS = (128, 32, 192)
N_MESSAGES = 32
QUICK_MESSAGES = 8
_SMALL_CONTEXT = 256
_S_PER_ENTRY, _S_PER_TIMED = 0.5, 0.5  # of 32 messages; of one repeat; on the slower of our machines


@dataclass(frozen=True)
class Settings:
    """What to measure; None stands for all. `repeats`: of each timing, 0 for none."""

    models: tuple[str, ...]
    tokens: tuple[int, ...] | None = None
    n_messages: int = N_MESSAGES
    codecs: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class WireResult:
    """`counted`: models that medians are taken over, where they qualify; `missing`: a line for each thing that was not
    there."""

    settings: Settings
    points: list[Point]
    counted: list[str]
    missing: list[str]
    seconds: float


OnPart = Callable[[str], None]


def default_models() -> tuple[tuple[str, ...], list[str]]:
    """The pretrained models of the shared folder and the zoo, and a line about what is not there."""
    found = shared_models()
    lines = [] if found else [f"no pretrained models: ${SHARED} names no folder that holds models"]
    return (*found, *zoo_names()), lines


def n_parts(settings: Settings) -> int:
    """How often `on_part` is called, at most."""
    n_timed = len(_timed(settings)) * len(GEOMETRIES) if settings.repeats else 0
    return len(settings.models) * len(settings.tokens or LENGTHS) * _n_entries(settings) + n_timed


def forecast_s(settings: Settings) -> float:
    """Roughly how long it will take."""
    n_subjects = (
        len(settings.models) * len(settings.tokens or LENGTHS) * 0.8
    )  # not every length fits every model
    per_entry = _S_PER_ENTRY * settings.n_messages / N_MESSAGES
    n_timed = len(_timed(settings)) * len(GEOMETRIES)
    return n_subjects * _n_entries(settings) * per_entry + n_timed * settings.repeats * _S_PER_TIMED


def run_bench(settings: Settings, on_part: OnPart = lambda what: None) -> WireResult:
    """Measure everything; `on_part` hears what begins."""
    start = time.perf_counter()
    entries, missing = _entries(settings)
    with one_thread():
        points = list(_quality_points(settings, entries, on_part))
        if not points:
            cure = f"A cache and {N_SUFFIX} tokens after it must fit: give fewer --tokens"
            raise UsageError(f"{settings.tokens} tokens fit no model's context", cure=cure)
        points += list(_speed_points(settings, on_part))
    named = replace(settings, models=tuple(map(public_name, settings.models)))
    counted = [public_name(name) for name in settings.models if name not in zoo_names()]
    return WireResult(named, points, counted, missing, time.perf_counter() - start)


def _entries(settings: Settings) -> tuple[list[Entry], list[str]]:
    peers, missing = peer_entries(settings.peers)
    own = own_entries(default_specs() if settings.codecs is None else settings.codecs)
    return [*peers, *own], missing


def _n_entries(settings: Settings) -> int:
    return len(_entries(settings)[0]) + (len(STEPS) if settings.codecs is None else 0)


def _timed(settings: Settings) -> list[Timed]:
    specs = SPECS if settings.codecs is None else settings.codecs
    peers = [
        p for p in installed_peers()[0] if p.timed and (settings.peers is None or p.codec in settings.peers)
    ]
    return [*map(timed_codec, specs), *map(timed_peer, peers)]


def lengths(settings: Settings, model: Model) -> list[int]:
    """What was asked for and fits; else 128 and 32 tokens, and 192 where the context is 256 and nothing longer fits."""
    small = model.geometry.max_positions == _SMALL_CONTEXT
    default = LENGTHS if small else LENGTHS[:2]
    return [tokens for tokens in settings.tokens or default if fits(model, tokens)]


def _quality_points(settings: Settings, entries: list[Entry], on_part: OnPart) -> Iterator[Point]:
    for name in settings.models:
        model, public = load(name, dtype="float32", device="cpu"), public_name(name)
        profiled = profile_entries(profile_name(model)) if settings.codecs is None else []
        for tokens in lengths(settings, model):
            subject = make_subject(model, tokens, settings.n_messages)
            for entry in [*entries, *profiled]:
                on_part(f"{public}, {tokens} tokens: {entry.codec}")
                yield _quality_point(settings, public, subject, entry)


def _quality_point(settings: Settings, name: str, subject: Subject, entry: Entry) -> Point:
    coded = entry.coding(subject)
    metrics = {"bits_per_element": coded.n_bits / subject.n_elements, **asdict(measure(subject, coded.kv))}
    recipe = {"codec": entry.codec, "spec": entry.spec, "model": name, "tokens": subject.tokens}
    n_bytes = {"message": coded.n_bits / 8 / subject.n_messages}
    task = f"suffix(tokens={N_SUFFIX})"
    return _point(settings, entry.label, recipe, task, settings.n_messages, metrics, n_bytes)


def _speed_points(settings: Settings, on_part: OnPart) -> Iterator[Point]:
    if not settings.repeats:
        return
    for geometry in GEOMETRIES:
        for timed in _timed(settings):
            on_part(f"speed, {geometry}: {timed.codec}")
            speed = measure_speed(timed, geometry, settings.repeats, settings.seed)
            recipe = {"codec": timed.codec, "spec": timed.spec, "model": geometry, "tokens": N_TOKENS}
            yield _point(settings, timed.label, recipe, "speed", settings.repeats, asdict(speed), {})


def _point(
    settings: Settings,
    label: str,
    recipe: dict[str, str | int],
    task: str,
    n: int,
    metrics: dict[str, float | None],
    n_bytes: dict[str, float],
) -> Point:
    return Point(
        arm=label,
        recipe=recipe,
        sender=str(recipe["model"]),
        receiver=str(recipe["model"]),
        task=task,
        split="test",
        n=n,
        seed=settings.seed,
        metrics=metrics,
        n_bytes=n_bytes,
    )
