"""From squared errors to directions, in the course of a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from kvferry.errors import BadSpec, UsageError
from kvferry.train.losses.entry import EntryLoss, PerVector, Vectors
from kvferry.train.losses.mercator import MercatorKVLoss
from kvferry.train.losses.moments import Whiten
from kvferry.train.losses.whitened_mse import squared_error

Schedule = Literal["constant", "linear", "cosine"]
SHARES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}
"""Share of its weight that Mercator has, by the share of the steps that are done."""


@dataclass(frozen=True, repr=False)
class HybridKVLoss(EntryLoss):
    """`mercator_weight` of the Mercator loss and `mse_weight` of the squared error, whitened so that the two compare.

    `linear` and `cosine` begin with the squared error alone, under the sum of both weights, and reach the two weights
    after `steps`; `at(step)` is the loss on the way. The seed promises the transition and keeps the weights constant.

    >>> HybridKVLoss(0.75, 0.25, schedule="linear").at(500).brief()
    'hybrid(mercator_weight=0.375, mse_weight=0.625)'
    """

    name: ClassVar[str] = "hybrid"
    mercator_weight: float = 0.8
    mse_weight: float = 0.2
    beta: float = 0.01
    schedule: Schedule = "constant"
    steps: int = 1000
    whiten: Whiten = field(default="channel", kw_only=True)

    def __post_init__(self) -> None:
        if min(self.mercator_weight, self.mse_weight, self.beta) < 0 or self.steps < 1:
            cure = "Weights are at least 0, steps at least 1"
            what = f"{self.mercator_weight}, {self.mse_weight}, {self.beta}, steps={self.steps}"
            raise BadSpec(f"hybrid({what})", cure=cure)

    def at(self, step: int) -> "HybridKVLoss":
        """The loss of a step, counted from 0, as one of constant weights."""
        share = SHARES[self.schedule](min(max(step / self.steps, 0.0), 1.0))
        mercator = share * self.mercator_weight
        mse = self.mse_weight + (1 - share) * self.mercator_weight
        return replace(self, mercator_weight=mercator, mse_weight=mse, schedule="constant")

    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        if self.schedule != "constant":
            raise UsageError(
                f"{self.brief()} has no weights by itself", cure="Take the loss of a step: at(step)"
            )
        mercator, told = MercatorKVLoss(beta=self.beta).compare(predicted, target)
        error = squared_error(predicted, target)
        return self.mercator_weight * mercator + self.mse_weight * error, {**told, "mse": error}
