"""`kvferry bench enrich`: a receiver without a skill, and the cache of a sender that has it; both read the same prompt.

Each seed is a training and test items of its own. All arms answer the same items, so comparisons are paired.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from kvferry.lab.enrich.arms import Pair, Seed, run_seed
from kvferry.lab.enrich.settings import KIND, Settings
from kvferry.lab.enrich.verdict import Comparison, comparisons, labels, verdict
from kvferry.lab.ledger import write_file
from kvferry.lab.point import Point
from kvferry.metrics.paired import clustered
from kvferry.models.load import load, public_name

OnPart = Callable[[str], None]


@dataclass(frozen=True)
class EnrichResult:
    """A point for each arm, the first fuser compared with all others, and what follows."""

    settings: Settings
    points: list[Point]
    comparisons: list[Comparison]
    verdict: list[str]
    seconds: float


def run_bench(settings: Settings, on_part: OnPart = lambda _: None) -> EnrichResult:
    """All seeds, one after the other. Raises what `load` and `fit_fuser` raise."""
    begun = time.perf_counter()
    pair = Pair.of(load(settings.sender), load(settings.receiver), settings.n_facts)
    seeds = [run_seed(pair, settings, seed, on_part) for seed in range(settings.seeds)]
    points = [_point(pair, settings, seeds, arm) for arm in seeds[0].marks]
    found = comparisons(seeds, settings.fusers)
    said = verdict({one.b: one for one in found})
    return EnrichResult(settings, points, found, said, time.perf_counter() - begun)


def save_enrich(result: EnrichResult, path: Path) -> None:
    """As JSON."""
    write_file(path, TypeAdapter(EnrichResult).dump_json(result, indent=1) + b"\n")


def _point(pair: Pair, settings: Settings, seeds: Sequence[Seed], arm: str) -> Point:
    own, twin = (np.concatenate([getattr(seed.marks[arm], side) for seed in seeds]) for side in _SIDES)
    by_seed = {
        f"accuracy_seed_{number}": float(seed.marks[arm].own.mean()) for number, seed in enumerate(seeds)
    }
    follows = float(twin.mean()) if arm == "twin" else None
    return Point(
        arm=arm,
        recipe=_recipe(pair, settings, seeds[0], arm),
        sender=public_name(pair.receiver.name if arm == "same_model" else pair.sender.name),
        receiver=public_name(pair.receiver.name),
        task=f"{KIND}({settings.n_facts} facts)",
        split="test",
        n=len(own),
        seed=0,
        metrics={"accuracy": float(own.mean()), "follows_payload": follows, **by_seed, **_cost(seeds, arm)},
        ci95={"accuracy": _interval(own, labels(seeds))},
        latency_ms={"fuse": float(np.median([s.fuse_ms[arm] for s in seeds]))} if _timed(seeds, arm) else {},
    )


_SIDES = ("own", "twin")


def _timed(seeds: Sequence[Seed], arm: str) -> bool:
    return arm in seeds[0].fuse_ms


def _interval(own: NDArray[np.int64], clusters: NDArray[np.int64]) -> tuple[float, float]:
    return clustered(own, np.zeros(len(own)), clusters, block=2).ci95


def _recipe(pair: Pair, settings: Settings, seed: Seed, arm: str) -> dict[str, str | int]:
    if arm in seed.fitted:
        recipe = seed.fitted[arm].recipe
        what = {"fuser": recipe.fuser, "options": str(recipe.options), "steps": recipe.loop.steps}
        rate = {"learning_rate": str(recipe.loop.learning_rate), "prompts": recipe.prompts}
        return {"arm": arm, **what, **rate, "hears": recipe.hears}
    place = {"sentence": pair.place} if arm == "text_to_text" else {}
    return {"arm": arm, "fuser": settings.ours if arm in ("zeroed", "mean", "twin") else "none", **place}


def _cost(seeds: Sequence[Seed], arm: str) -> dict[str, float | None]:
    if arm not in seeds[0].fitted:
        return {}
    fitted = [seed.fitted[arm] for seed in seeds]
    return {
        "parameters": fitted[0].n_parameters,
        "mb_float32": 4e-6 * fitted[0].n_parameters,
        "fit_seconds": float(np.mean([one.seconds for one in fitted])),
    }
