"""Direction first, length second: a map that keeps angles, as Mercator's does.

After the loss of that name in theodorewang0731-hash/quickly-check-for-mulit-teacher-kava-ache, corrected.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.train.losses.cosine import EPSILON, direction
from kvferry.train.losses.entry import EntryLoss, PerVector, Vectors

SHORTEST = 0.01
"""Of the target's length: a shorter vector counts as about so long, or the gradient of its logarithm would explode."""


@dataclass(frozen=True, repr=False)
class MercatorKVLoss(EntryLoss):
    """`alpha * (1 - cosine) + beta * log(|predicted| / |target|) ** 2`, by head; told apart as dir_loss and mag_loss.

    Also tells `cos_sim`, and `magnitude`, the mean of |predicted| / |target|. The seed joins all layers into one
    vector, whose cosine is that of its longest layers; this one compares head by head. Length is no mere confidence:
    that of keys is the temperature of attention, that of values scales what is read. So `beta=0` needs a loss beside.

    >>> import torch
    >>> one = torch.tensor([1.0, 2.0])
    >>> round(MercatorKVLoss(beta=0.0).compare(100 * one, one)[0].item(), 4)
    0.0
    >>> round(MercatorKVLoss().compare(100 * one, one)[0].item(), 3)
    0.212
    """

    name: ClassVar[str] = "mercator"
    alpha: float = 1.0
    beta: float = 0.01
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0 or not self.epsilon > 0:
            cure = "Weights are at least 0, epsilon is above 0"
            raise BadSpec(f"mercator({self.alpha}, {self.beta}, {self.epsilon})", cure=cure)

    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        direction_loss, cosine = direction(predicted, target, self.epsilon)
        ratio = log_ratio(predicted, target, self.epsilon)
        told = {
            "cos_sim": cosine,
            "dir_loss": direction_loss,
            "mag_loss": ratio.square(),
            "magnitude": ratio.exp(),
        }
        return self.alpha * direction_loss + self.beta * ratio.square(), told


def log_ratio(
    predicted: Float[Tensor, "*vectors dim"], target: Float[Tensor, "*vectors dim"], epsilon: float
) -> Float[Tensor, "*vectors"]:
    """log(|predicted| / |target|), bent towards log(SHORTEST) where the first is much shorter; 0 if they are equal."""
    got, want = predicted.square().sum(-1), target.square().sum(-1)
    floor = SHORTEST**2 * want + epsilon**2
    return ((got + floor) / (want + floor)).log() / 2
