"""Directions of vectors, whatever their lengths."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.train.losses.entry import EntryLoss, PerVector, Vectors

EPSILON = 1e-8
"""Length below which a vector has no direction."""


@dataclass(frozen=True, repr=False)
class CosineLoss(EntryLoss):
    """One less the cosine, token by token and head by head.

    Plain, a constant vector may come near zero: keys are mostly their mean. `whiten=channel` compares what differs.

    >>> import torch
    >>> loss, told = CosineLoss().compare(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    >>> round(loss.item(), 3), round(told["cos_sim"].item(), 3)
    (0.04, 0.96)
    """

    name: ClassVar[str] = "cosine"

    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        loss, cosine = direction(predicted, target, EPSILON)
        return loss, {"cos_sim": cosine}


def direction(
    predicted: Float[Tensor, "*vectors dim"], target: Float[Tensor, "*vectors dim"], epsilon: float
) -> tuple[Float[Tensor, "*vectors"], Float[Tensor, "*vectors"]]:
    """Half the squared distance of the unit vectors, and their cosine.

    The first is one less the second, without its rounding near one; and zero where both vectors are zero.
    """
    got, want = (
        part / (part.square().sum(-1, keepdim=True) + epsilon**2).sqrt() for part in (predicted, target)
    )
    return (got - want).square().sum(-1) / 2, (got * want).sum(-1)
