"""The demo: one model reads, another one in another process answers, beside every honest alternative.

Nothing is trained. Each item is read once by the sender; its cache is then coded, sent by TCP and answered arm by arm.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvferry.align.folder import aligner_folder, load_contract
from kvferry.codec.profiles import hold_profiles
from kvferry.lab.arms import ARMS, Arm, Reading, arms_for, mean_groups
from kvferry.lab.compare import Test, compare
from kvferry.lab.items import Batch, Worlds, chance
from kvferry.lab.latency import Times, stage_times
from kvferry.lab.peer import Peer, receiver_process
from kvferry.lab.point import Point
from kvferry.lab.run import Outcome, Score, run_alone, run_arm
from kvferry.metrics.paired import binomial_test
from kvferry.models.load import public_name
from kvferry.session.sender import Sender

N_OTHERS = 64
"""Texts of the dev split that the mean cache is taken over."""

OnArm = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """`chance`: accuracy of guessing by type; `n_slots`: tokens that a cache carries, on average."""

    rows: list[Point]
    tests: list[Test]
    processes: list[dict[str, str | int]]
    chance: float
    n_slots: float

    def row(self, arm: str) -> Point:
        return next(row for row in self.rows if row.arm == arm)

    def test(self, a: str, b: str) -> Test:
        return next(test for test in self.tests if (test.a, test.b) == (a, b))


@dataclass(frozen=True)
class Demo:
    """What is evaluated."""

    sender: str
    receiver: str
    aligner: str | None
    n_items: int = 500
    seed: int = 0
    worlds: Worlds = field(default_factory=Worlds)

    def arms(self) -> tuple[Arm, ...]:
        """What the receiver's aligner can be sent; raises what `arms_for` raises."""
        if self.aligner is None:
            return ARMS
        hold_profiles(aligner_folder(self.aligner))
        return arms_for(load_contract(self.aligner).coded_with)

    def onto(self) -> str | None:
        """The receiver, where the aligner reads its tokens: the sender then pools to them."""
        on_receivers = self.aligner is not None and load_contract(self.aligner).grid == "receiver"
        return self.receiver if on_receivers else None

    def n_steps(self) -> int:
        """How often `on_arm` is called."""
        return len(self.arms()) + 1


def run_demo(demo: Demo, on_arm: OnArm = lambda arm: None) -> DemoResult:
    """Start the receiver as a second process and evaluate every arm over TCP. `on_arm` hears which one begins."""
    # Refuse now what would fail after minutes.
    binomial_test()
    demo.arms()
    batches = demo.worlds.twins(demo.n_items, demo.seed)
    sender = Sender(demo.sender, onto=demo.onto())
    with receiver_process(demo.sender, demo.receiver, demo.aligner) as peer:
        return asyncio.run(_evaluate(demo, sender, peer, batches, on_arm))


async def _evaluate(
    demo: Demo, sender: Sender, peer: Peer, batches: list[Batch], on_arm: OnArm
) -> DemoResult:
    mean = mean_groups(sender.capture(demo.worlds.others(N_OTHERS, demo.seed)))
    readings = [Reading(batch, sender.capture(batch.contexts), mean) for batch in batches]
    rows: list[Point] = []
    scores: dict[str, Score] = {}
    for arm in demo.arms():
        on_arm(arm.name)
        outcome = await run_arm(peer, arm.sender(sender), arm, readings)
        times = await stage_times(peer, arm.sender(sender), arm, batches, mean) if _is_timed(arm) else {}
        scores[arm.name] = Score.of(outcome, batches, arm.world)
        rows.append(_point(demo, arm.name, arm.recipe(arm.sender(sender)), outcome, scores[arm.name], times))
    on_arm("sender_alone")
    alone = run_alone(sender, batches)
    scores["sender_alone"] = Score.of(alone, batches, "own")
    rows.append(_point(demo, "sender_alone", "text", alone, scores["sender_alone"], {}))
    return DemoResult(
        rows, compare(scores, demo.seed), _processes(peer), chance(batches), _mean_slots(readings)
    )


def _is_timed(arm: Arm) -> bool:
    return arm.family == "cache" or arm.name == "text_full"


def _point(demo: Demo, arm: str, recipe: str, outcome: Outcome, score: Score, times: Times) -> Point:
    return Point(
        arm=arm,
        recipe=recipe,
        sender=public_name(demo.sender),
        receiver=public_name(demo.receiver),
        task=str(demo.worlds),
        split=demo.worlds.split,
        n=demo.n_items,
        seed=demo.seed,
        metrics=score.metrics(),
        ci95=score.ci95(),
        n_bytes={"message": outcome.message_bytes, "link": outcome.link_bytes},
        latency_ms=times,
    )


def _processes(peer: Peer) -> list[dict[str, str | int]]:
    return [{"role": "sender", "pid": os.getpid()}, {"role": "receiver", "pid": peer.pid}]


def _mean_slots(readings: list[Reading]) -> float:
    """Mean number of tokens that a cache holds."""
    counts = [reading.kv.present[0].sum(-1) for reading in readings]
    return float(torch.cat(counts).float().mean())
