"""The seeded engine: frame number i of seed s is the same everywhere, so a finding is two numbers."""

import multiprocessing
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz import oracle
from fuzz.mutate import mutated
from fuzz.seeds import Seed, seeds
from fuzz.structure import restructured

CHUNK = 5000
HEADROOM = 64 << 20
"""Bytes by which a process may grow once it has read every seed."""
SLOW_S = 1.0
_MEMORY_EVERY, _ASIDE_EVERY = 64, 8
_MOST_FINDINGS = 10


@dataclass
class Report:
    """What came of some frames: how often each outcome, and findings in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        self.outcomes += other.outcomes
        self.findings += other.findings


def frame(seed_number: int, index: int) -> tuple[Seed, list[bytes]]:
    """Frame `index`: its seed, and its bytes; several for datagrams."""
    random = Random(seed_number << 48 | index)
    seed = random.choice(seeds())
    if seed.datagrams:
        pieces = [
            mutated(random, piece, seed.datagrams) if random.random() < 0.3 else piece
            for piece in seed.datagrams
        ]
        return seed, random.choices(pieces, k=random.randint(1, 2 * len(pieces)))
    if random.random() < 0.5:
        return seed, [mutated(random, seed.data, [other.data for other in seeds()])]
    return seed, [restructured(random, seed)]


def try_frame(seed_number: int, index: int) -> str:
    """One frame through the oracle; whatever is raised is a finding."""
    seed, data = frame(seed_number, index)
    start = time.process_time()
    outcome = oracle.check_datagrams(data) if seed.datagrams else oracle.check(seed, data[0])
    elapsed = time.process_time() - start
    assert elapsed < SLOW_S, f"{elapsed:.2f} s"
    if not seed.datagrams and index % _ASIDE_EVERY == 0:
        oracle.check_aside(seed, data[0])
        oracle.check_paths(seed, data[0])
    if not seed.datagrams and index % _MEMORY_EVERY == 0:
        oracle.check_memory(seed, data[0])
    return outcome


def run_chunk(seed_number: int, first: int, n: int) -> Report:
    """Frames `first` to `first + n`."""
    report = Report()
    for index in range(first, first + n):
        try:
            report.outcomes[try_frame(seed_number, index)] += 1
        except Exception:  # noqa: BLE001 (the finding is that it is none of ours)
            report.findings.append(_finding(seed_number, index))
            if len(report.findings) >= _MOST_FINDINGS:
                break
    return report


def run(seed_number: int, n: int, seconds: float | None, jobs: int, tell: Callable[[Report], None]) -> Report:
    """`n` frames, or as many as the seconds allow, on `jobs` processes that may grow by `HEADROOM`.

    `tell` hears now and then how far it is.
    """
    report, start = Report(), time.monotonic()
    chunks = iter([(seed_number, first, min(CHUNK, n - first)) for first in range(0, n, CHUNK)])
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Report], tuple[int, int, int]] = {}
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_confine) as pool:
        while len(report.findings) < _MOST_FINDINGS:
            late = seconds is not None and time.monotonic() - start > seconds
            while len(running) < 2 * jobs and not late and (chunk := next(chunks, None)):
                running[pool.submit(run_chunk, *chunk)] = chunk
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                report.add(_result(done, running.pop(done)))
                tell(report)
    return report


def _result(done: Future[Report], chunk: tuple[int, int, int]) -> Report:
    try:
        return done.result()
    except BrokenProcessPool:
        seed_number, first, n = chunk
        return Report(findings=[f"seed {seed_number}: the process died in frames {first} to {first + n - 1}"])


def _confine() -> None:
    """Read every seed, each way, then bound the memory for good."""
    oracle.be_strict()
    for seed in seeds():
        if not seed.datagrams:
            assert oracle.check(seed, seed.data) == "read", seed.name
            oracle.check_paths(seed, seed.data)
    run_chunk(0, 0, 500)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    ceiling = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _finding(seed_number: int, index: int) -> str:
    seed, data = frame(seed_number, index)
    shown = "\n".join(piece.hex() for piece in data)
    return f"--seed {seed_number} --at {index}, from {seed.name!r}\n{shown}\n{traceback.format_exc()}"
