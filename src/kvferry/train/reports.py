"""What a training tells: of each step, of each look at dev, and how it ended."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """What one step did; the norm is that of the gradient before it was clipped."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What dev said after `step` steps: of the weights as they are, and of their average where there is one."""

    step: int
    loss: float
    averaged_loss: float | None
    best: float


@dataclass(frozen=True)
class Trained:
    """How it ended. The module then holds the weights of `best_step` where dev was asked, else the last ones.

    `averaged` says that these are the moving average, which is handed back where it is better, or where nobody asked
    dev. `early` says that patience ended the training.
    """

    steps: int
    loss: float
    best_loss: float | None
    best_step: int
    averaged: bool
    early: bool
