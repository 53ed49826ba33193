"""Which arms are compared with which, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.lab.arms import family_of
from kvferry.lab.run import Score
from kvferry.metrics.paired import Interval, Verdict, paired

_CONTROLS = ("receiver_only", "kv_zeroed", "kv_mean")
_PAIRS = (
    ("kv_int8", "kv_raw"),
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


def pairs(caches: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared where these arms send the sender's cache: each with the text, the controls and int8."""
    return [
        *((arm, "text_full") for arm in caches),
        *((arm, control) for arm in caches for control in _CONTROLS),
        *((arm, "kv_int8") for arm in caches if arm not in ("kv_raw", "kv_int8")),
        *_PAIRS,
    ]


def compare(scores: Mapping[str, Score], seed: int) -> list[Test]:
    """All `pairs` of the arms that were scored; twins are resampled together."""
    caches = [arm for arm in scores if family_of(arm) == "cache"]
    return [_test(a, b, scores, seed) for a, b in pairs(caches)]


def _test(a: str, b: str, scores: Mapping[str, Score], seed: int) -> Test:
    found = paired(scores[a].own, scores[b].own, block=2, seed=seed)
    return Test(a, b, found.difference, found.ci95, found.p, found.verdict)
