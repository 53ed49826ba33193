"""How a loop trains: everything that decides it beside the module, the loss and the data."""

import math
from dataclasses import dataclass, field
from typing import Literal

from kvferry.errors import UsageError

FINAL_RATE = 0.01
"""Share of the peak learning rate that is left at the end of the cosine."""


@dataclass(frozen=True)
class LoopRecipe:
    """Adam with decoupled weight decay (arXiv:1711.05101), a warm-up and a cosine down to a hundredth.

    Raises `UsageError` for values out of range.

    >>> recipe = LoopRecipe(steps=100, learning_rate=1.0)
    >>> round(recipe.rate(0), 3), round(recipe.rate(49), 3), round(recipe.rate(99), 3)
    (0.02, 0.521, 0.01)
    """

    steps: int = 3000
    learning_rate: float = 7e-4
    """At its peak."""
    shares: dict[str, float] = field(default_factory=dict)
    """Beginnings of parameter names -> share of the learning rate; the longest that fits counts; 0 freezes."""
    warmup: int = 50
    """Steps until the peak."""
    weight_decay: float = 0.0
    """Of matrices; biases, gates and norms do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient; infinity for none."""
    accumulate: int = 1
    """Pieces in which a batch is read, one after the other: less memory, the same gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass (autocast); weights, gradients and Adam's moments stay in fp32."""
    evaluate_every: int = 0
    """Steps between evaluations on dev; 0 for start and end only."""
    patience: int = 0
    """Evaluations without a new best after which training stops; 0 for never."""
    average: float = 0.0
    """Decay of the moving average of the weights, judged beside them on dev; 0 for no average."""
    checkpoint_every: int = 0
    """Steps between checkpoints, where there is a folder; 0 for the end only."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("steps", "warmup", "evaluate_every", "patience", "checkpoint_every", "seed", "weight_decay")
        least_zero = {name: getattr(self, name) for name in names}
        least_zero |= {f"the share of {prefix!r}": share for prefix, share in self.shares.items()}
        for name, value in least_zero.items():
            _require(0 <= value < math.inf, name, value, "at least 0")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        _require(0 <= self.average < 1, "average", self.average, "0, or a decay below 1")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a positive number")
        _require(self.clip > 0, "clip", self.clip, "a positive number, or infinity")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def share(self, name: str) -> float:
        """The share of the learning rate that a parameter gets."""
        fitting = [prefix for prefix in self.shares if name.startswith(prefix)]
        return self.shares[max(fitting, key=len)] if fitting else 1.0


def _require(holds: bool, name: str, value: float, cure: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, out of range", cure=f"Give {cure}")
