"""The weights that a training may hand back: those of the last step, their moving average, or the best that dev saw."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Weights = Sequence[Float[Tensor, "..."]]


@dataclass
class Average:
    """The plain mean of the weights so far, until it spans 1 / (1 - decay) steps; from then on exponential.

    So it needs no correction of its start, and it is well defined wherever training stops early.
    """

    decay: float
    weights: Weights
    n: int = 0

    @torch.no_grad()
    def add(self, weights: Weights) -> None:
        self.n += 1
        share = max(1 - self.decay, 1 / self.n)
        for mean, now in zip(self.weights, weights, strict=True):
            mean.lerp_(now, share)


@dataclass
class Best:
    """What dev liked best so far. A loss that is no number never wins."""

    loss: float = math.inf
    step: int = 0
    averaged: bool = False
    n_since: int = 0
    """Evaluations after it."""
    weights: Weights = field(default_factory=list)
    """Empty until there was one."""

    def offer(self, loss: float, step: int, weights: Weights, *, averaged: bool) -> None:
        if loss < self.loss:
            self.loss, self.step, self.averaged, self.n_since = loss, step, averaged, 0
            self.weights = copies(weights)


def copies(weights: Weights) -> list[Float[Tensor, "..."]]:
    return [tensor.detach().clone() for tensor in weights]


@torch.no_grad()
def put(weights: Weights, into: Weights) -> None:
    """Copy values; both stay their own tensors."""
    for source, target in zip(weights, into, strict=True):
        target.copy_(source)


@contextmanager
def holding(weights: Weights, module: Weights) -> Iterator[None]:
    """The module has these weights for a while, then its own again."""
    own = copies(module)
    put(weights, module)
    try:
        yield
    finally:
        put(own, module)
