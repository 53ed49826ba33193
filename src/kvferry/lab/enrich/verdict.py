"""What the fused receiver beats, and what explains its gain where it does not.

Rule 1: a control that is not beaten explains the gain, until more items say otherwise.
Rule 2: where the interval holds zero nothing was beaten, however large the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvferry.lab.enrich.arms import Seed
from kvferry.metrics.paired import Interval, Verdict, clustered

EXPLANATIONS = {
    "receiver_only": "the receiver answers as well without the sender",
    "text_to_text": "the sender's answer in a sentence, read with the context, does as well",
    "mean": "any sender's cache does as well, whatever it says",
    "zeroed": "the trained fuser does as well without one number of the sender",
    "same_model": "as many trained parameters on the receiver's own cache do as well",
}
"""The controls, and what each says where it is not beaten."""
BESIDE = {
    "answer_passed_on": "the receiver, told the sender's answer and nothing else",
    "sender_only": "the sender itself",
    "context_only": "a fuser whose sender has not read the question",
    "twin": "the cache of another context",
}
"""What else stands beside: not controls of a gain, but what else one could do."""


@dataclass(frozen=True)
class Comparison:
    """An arm's accuracy less that of another, on the same items, seeds as clusters."""

    a: str
    b: str
    difference: float
    ci95: Interval
    verdict: Verdict


def compare(seeds: Sequence[Seed], a: str, b: str) -> Comparison:
    """Paired over all seeds' items; twins are drawn together."""
    first, second = (np.concatenate([seed.marks[arm].own for seed in seeds]) for arm in (a, b))
    found = clustered(first, second, labels(seeds), block=2)
    return Comparison(a, b, found.difference, found.ci95, found.verdict)


def comparisons(seeds: Sequence[Seed], fusers: Sequence[str]) -> list[Comparison]:
    """The first fuser with everything else."""
    others = [*EXPLANATIONS, *BESIDE, *fusers[1:]]
    return [compare(seeds, fusers[0], other) for other in others]


def labels(seeds: Sequence[Seed]) -> NDArray[np.int64]:
    """The seed of each item."""
    return np.repeat(np.arange(len(seeds)), [len(seed.marks["receiver_only"].own) for seed in seeds])


def verdict(found: Mapping[str, Comparison]) -> list[str]:
    """Sentences: whether every control is beaten, which one explains the gain, and what else would do."""
    lost = {name: found[name] for name in EXPLANATIONS if found[name].verdict != "a better"}
    ours = next(iter(found.values())).a
    if not lost:
        lines = [f"{ours} beats every control: {', '.join(EXPLANATIONS)}."]
    else:
        lines = [_explained(ours, one) for one in lost.values()]
        beaten = [name for name in EXPLANATIONS if name not in lost]
        lines += [f"{ours} beats {', '.join(beaten)}."] if beaten else []
    return [*lines, *(_beside(found[name], what) for name, what in BESIDE.items() if name in found)]


def _explained(ours: str, one: Comparison) -> str:
    doubt = "may explain" if one.verdict == "undecided" else "explains"
    return f"{one.b} {doubt} the gain of {ours} ({_difference(one)}): {EXPLANATIONS[one.b]}."


def _beside(one: Comparison, what: str) -> str:
    said = {"a better": "does worse", "b better": "does better", "undecided": "is not told apart from it"}
    return f"{one.b}, {what}, {said[one.verdict]} ({_difference(one)})."


def _difference(one: Comparison) -> str:
    low, high = one.ci95
    return f"{one.difference:+.3f}, {low:+.3f} to {high:+.3f}"
