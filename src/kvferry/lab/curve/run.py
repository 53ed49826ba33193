"""The grid: every arm under every cap, seed by seed; what the ledger holds is not measured again."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from kvferry.errors import UsageError
from kvferry.lab.curve.arms import Arm, arms_of
from kvferry.lab.curve.caps import TEXT_CAPS, Cap, cap_name
from kvferry.lab.curve.crossing import draws
from kvferry.lab.curve.ledger import Ledger, Line, key_of
from kvferry.lab.curve.outcome import Outcome, measure
from kvferry.lab.curve.result import CurveResult, result_of
from kvferry.lab.curve.road import Road
from kvferry.lab.curve.room import Room, room_of
from kvferry.lab.curve.spec import Spec
from kvferry.lab.curve.task import Split, Task
from kvferry.lab.point import Point
from kvferry.metrics.paired import Interval, bootstrap_mean, wilson
from kvferry.models.load import public_name
from kvferry.session.selecting import require_pairing

N_TIMED = 16
"""Items of the small batch that a forecast is made from."""


@dataclass(frozen=True)
class Settings:
    """`n_items` of each test seed; `n_dev` of one dev seed, on which a family's best spec is chosen."""

    task: Task
    specs: tuple[Spec, ...]
    caps: tuple[Cap, ...]
    n_items: int = 500
    n_dev: int = 100
    n_seeds: int = 3
    text_caps: tuple[Cap, ...] = TEXT_CAPS

    def arms(self) -> list[Arm]:
        return arms_of(self.specs, questions=self.task.recalls)

    def caps_for(self, arm: Arm) -> tuple[Cap, ...]:
        """Caches go under `caps`, texts under those of their own size."""
        if arm.spec is not None:
            return self.caps
        return self.text_caps if arm.capped else (None,)


@dataclass(frozen=True)
class Job:
    """One line of the ledger."""

    split: Split
    seed: int
    n: int
    arm: Arm
    cap: Cap


@dataclass(frozen=True)
class Forecast:
    """Seconds that an arm takes for `N_TIMED` items under one cap, and how many such batches are left to do."""

    arm: str
    batch_s: float
    n_batches: float

    @property
    def seconds(self) -> float:
        return self.batch_s * self.n_batches


OnJob = Callable[[Job], None]


def jobs_of(settings: Settings) -> list[Job]:
    """Dev for families in which there is something to choose, then test; a seed after the other."""
    arms = settings.arms()
    rivals = [arm for arm in arms if arm.spec and sum(arm.family == other.family for other in arms) > 1]
    dev = [Job("dev", 0, settings.n_dev, arm, cap) for arm in rivals for cap in settings.caps]
    return dev + [
        Job("test", seed, settings.n_items, arm, cap)
        for seed in range(settings.n_seeds)
        for arm in arms
        for cap in settings.caps_for(arm)
    ]


def forecast(road: Road, settings: Settings, ledger: Ledger) -> list[Forecast]:
    """Time a small batch of each arm, under caps from tight to none; raises what an arm would raise later."""
    left = [job for job in jobs_of(settings) if ledger.get(_key(road, settings.task, job)) is None]
    if not left:
        return []
    room = room_of(road, settings.task, settings.specs, N_TIMED, 0, "dev")
    _ = room.sights
    n_batches = {job.arm.name: 0.0 for job in left}
    for job in left:
        n_batches[job.arm.name] += job.n / N_TIMED
    arms = {job.arm.name: job.arm for job in left}
    return [
        Forecast(name, _batch_s(room, arms[name], settings.caps_for(arms[name])), n)
        for name, n in n_batches.items()
    ]


def run_curve(
    road: Road, settings: Settings, ledger: Ledger, on_job: OnJob = lambda job: None
) -> CurveResult:
    """Measure what the ledger lacks, and compare. `on_job` hears of each line, held or new, when it is there.

    Raises `CodecNotCovered` before anything is measured, `UsageError` for questions where none are asked.
    """
    start = time.perf_counter()
    require(road, settings)
    lines = [
        line
        for (split, seed), jobs in groupby(jobs_of(settings), key=lambda job: (job.split, job.seed))
        for line in _seed_lines(road, settings, ledger, list(jobs), on_job)
    ]
    return result_of(settings.task, lines, time.perf_counter() - start)


def require(road: Road, settings: Settings) -> None:
    """Refuse now what would fail after minutes."""
    for n in (settings.n_items, settings.n_dev):
        settings.task.require_items(n)
    for spec in settings.specs:
        require_pairing(spec.codec, spec.selector)
        spec.selector.require_sender(road.sender.geometry)
    road.require(settings.specs)
    asked = [spec.name for spec in settings.specs if spec.selector.reads_question]
    if asked and not settings.task.recalls:
        cure = "Leave it out, or choose a task with questions: place:8, needle, two_hops"
        raise UsageError(f"{asked[0]} reads a question, and stories ask none", cure=cure)


def _seed_lines(
    road: Road, settings: Settings, ledger: Ledger, jobs: Sequence[Job], on_job: OnJob
) -> Iterator[Line]:
    room: Room | None = None
    for job in jobs:
        line = ledger.get(key := _key(road, settings.task, job))
        if line is None:
            room = room or room_of(road, settings.task, settings.specs, job.n, job.seed, job.split)
            line = _measured(room, settings.task, job, key)
            ledger.add(line)
        on_job(job)
        yield line


def _measured(room: Room, task: Task, job: Job, key: str) -> Line:
    start = time.perf_counter()
    outcome = measure(room, job.arm, job.cap)
    return Line(key, point_of(room.road, task, job, outcome), outcome, time.perf_counter() - start)


def _key(road: Road, task: Task, job: Job) -> str:
    where: dict[str, str | int] = {"split": job.split, "seed": job.seed, "n": job.n, "task": str(task)}
    return key_of({**road.identity, **where, "arm": job.arm.identity, "cap": cap_name(job.cap)})


def point_of(road: Road, task: Task, job: Job, outcome: Outcome) -> Point:
    """Where nothing could be sent the recipe says why, and quality is None."""
    recipe = {**job.arm.recipe, "cap": cap_name(job.cap)}
    metrics, ci95 = _metrics(task, outcome)
    if outcome.error is not None:
        recipe["error"] = outcome.error
        metrics, ci95 = dict.fromkeys(metrics), dict.fromkeys(ci95)
    if outcome.smallest_cap is not None:
        recipe["smallest_cap"] = outcome.smallest_cap
    share = {"share_unmet": 1 - outcome.n_sent / outcome.n}
    return Point(
        arm=job.arm.name,
        recipe=recipe,
        sender=public_name(road.sender.name),
        receiver=public_name(road.receiver.name),
        task=str(task),
        split=job.split,
        n=outcome.n,
        seed=job.seed,
        metrics={**metrics, **outcome.use_of(job.cap), **outcome.selected(), **share},
        ci95=ci95,
        n_bytes=outcome.mean_bytes(),
        latency_ms=outcome.latency_ms(),
    )


def _metrics(task: Task, outcome: Outcome) -> tuple[dict[str, float | None], dict[str, Interval | None]]:
    score, weight, nll = (np.array(part) for part in (outcome.score, outcome.weight, outcome.nll))
    ci95 = wilson(round(score.sum()), outcome.n) if task.recalls else _gap_ci95(score, weight)
    metrics: dict[str, float | None] = {
        task.metric: float(score.sum() / weight.sum()),
        "nll": float(nll.mean()),
    }
    return metrics, {task.metric: ci95, "nll": bootstrap_mean(nll)}


def _gap_ci95(score: np.ndarray, weight: np.ndarray) -> Interval:
    """Of the sums' ratio, over resampled passages."""
    counts = draws(np.zeros(len(score), np.int64), 0)
    low, high = np.quantile(counts @ score / (counts @ weight), [0.025, 0.975])
    return float(low), float(high)


def _batch_s(room: Room, arm: Arm, caps: Sequence[Cap]) -> float:
    """The mean over the tightest cap, one in the middle, and the widest."""
    tried = {caps[0], caps[len(caps) // 2], caps[-1]}
    start = time.perf_counter()
    for cap in tried:
        measure(room, arm, cap)
    return (time.perf_counter() - start) / len(tried)
