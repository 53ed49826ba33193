"""Which arms are compared with which, and the verdicts."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvferry.lab.arms import ECSQ_STEPS
from kvferry.lab.run import Score
from kvferry.metrics.paired import Interval, Verdict, paired

_CACHES = ("kv_raw", "kv_int8", "kv_int4", *(f"kv_ecsq_{step}" for step in ECSQ_STEPS))
PAIRS: tuple[tuple[str, str], ...] = (
    *((arm, "text_full") for arm in _CACHES),
    *((arm, control) for arm in _CACHES for control in ("receiver_only", "kv_zeroed", "kv_mean")),
    ("kv_int4", "kv_int8"),
    ("kv_int8", "kv_raw"),
    *((f"kv_ecsq_{step}", "kv_int8") for step in ECSQ_STEPS),
    ("kv_int8", "text_at_64"),
    ("kv_int4", "text_at_64"),
    ("kv_int8", "sender_alone"),
)


@dataclass(frozen=True)
class Test:
    """The paired difference of two arms' accuracy."""

    __test__ = False  # no test case of pytest's

    a: str
    b: str
    difference: float
    ci95: Interval
    p: float | None
    verdict: Verdict


def compare(scores: Mapping[str, Score], seed: int) -> list[Test]:
    """Each of `PAIRS`; twins are resampled together."""
    return [_test(a, b, scores, seed) for a, b in PAIRS]


def _test(a: str, b: str, scores: Mapping[str, Score], seed: int) -> Test:
    found = paired(scores[a].own, scores[b].own, block=2, seed=seed)
    return Test(a, b, found.difference, found.ci95, found.p, found.verdict)
