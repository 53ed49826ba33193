"""What every loss between two caches does: `over_cache(loss, predicted, target, aids) -> (loss, metrics)`.

Rule 1: no gradient reaches the target. Where both sides may move, both move to a constant, and the loss is zero.
Rule 2: a slot that either cache lacks counts nowhere, neither in a value nor in a gradient, whatever it holds.
Rule 3: numbers are compared in fp32 or finer; metrics are tensors without gradient, and nothing waits for a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.kv import KV
from kvferry.metrics.attention import Scores
from kvferry.spec import Method
from kvferry.train.losses.moments import CacheMoments

Aid = Literal["moments", "reads", "task"]
Terms = tuple[Float[Tensor, "..."], dict[str, Float[Tensor, "..."]]]
"""A loss, and by name what it is made of or tells beside, detached. By layer, or 0-dim."""


@dataclass(frozen=True)
class Reads:
    """Real queries of the receiver, rotated, by layer; where they stand, which count, and how each layer scores.

    Layers may differ in query heads and dims.
    `capture` gives them as `queries_rotated`, `models.scores.scores_of` the scores.
    """

    queries: tuple[Float[Tensor, "batch _ new _"], ...]
    positions: Int[Tensor, "batch new"]
    mask: Bool[Tensor, "batch new"]
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Aids:
    """What a loss may need beside two caches; each one says what, in `needs`.

    `moments` are of the receiver's own caches; `task` is a loss of the mapped cache through the real receiver.
    """

    moments: CacheMoments | None = None
    reads: Reads | None = None
    task: Callable[[KV], Float[Tensor, ""]] | None = None


NO_AIDS = Aids()
_MAKE = {
    "moments": "those of the receiver's own caches, see moments_of",
    "reads": "the receiver's own queries, as Reads",
    "task": "a function from the mapped cache to a loss",
}


@dataclass(frozen=True, repr=False)
class KVLoss(Method, ABC):
    """A distance of a predicted cache from the receiver's own one."""

    @property
    def needs(self) -> frozenset[Aid]:
        """The aids without which it cannot be computed; `UsageError` where one is missing."""
        return frozenset()

    def at(self, step: int) -> "KVLoss":
        """The loss of one training step; itself, unless it has a schedule."""
        return self

    @abstractmethod
    def on_cache(self, predicted: KV, target: KV, aids: Aids) -> Terms:
        """Call `over_cache`, which checks first."""


def over_cache(loss: KVLoss, predicted: KV, target: KV, aids: Aids = NO_AIDS) -> Terms:
    """The loss between two caches of one geometry, the mean over layers, K and V. Differentiable in `predicted`.

    Metrics are 0-dim tensors. Raises `ShapeMismatch` for caches that cannot be compared, `UsageError` for a missing
    aid, `WrongKeySpace` where numbers of rotated keys would be compared.
    """
    if predicted.geometry != target.geometry:
        raise ShapeMismatch("caches of two geometries", cure="Align one to the other's model first")
    return loss.on_cache(predicted, target, aids)


def missing(loss: KVLoss, aid: Aid) -> UsageError:
    """The error for an aid that was not given."""
    return UsageError(f"{loss.brief()} needs {aid}", cure=f"Give {_MAKE[aid]}")
