"""Squared error in units of the target's own spread."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.train.losses.entry import EntryLoss, PerVector, Vectors
from kvferry.train.losses.moments import Whiten


@dataclass(frozen=True, repr=False)
class WhitenedMSE(EntryLoss):
    """Mean over channels of the squared error, over the target's variance by channel or head.

    One is what the target's mean costs, in any layer and head, K or V. With `whiten=none` it is the plain mean squared
    error, which the widest heads decide: a baseline.

    >>> import torch
    >>> loss, _ = WhitenedMSE().compare(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> loss.item()
    1.0
    """

    name: ClassVar[str] = "whitened_mse"
    whiten: Whiten = "channel"

    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        error = squared_error(predicted, target)
        return error, {"mse": error}


def squared_error(
    predicted: Float[Tensor, "*vectors dim"], target: Float[Tensor, "*vectors dim"]
) -> Float[Tensor, "*vectors"]:
    """Mean over channels: 1 / (N d) in all, N the vectors."""
    return (predicted - target).square().mean(-1)
