"""Numbers, directions, and what the receiver makes of them."""

from dataclasses import dataclass, field
from typing import ClassVar

from kvferry.errors import BadSpec
from kvferry.kv import KV
from kvferry.train.losses.base import Aid, Aids, Terms, missing
from kvferry.train.losses.cosine import EPSILON, direction
from kvferry.train.losses.entry import EntryLoss, PerVector, Vectors
from kvferry.train.losses.moments import Whiten
from kvferry.train.losses.whitened_mse import squared_error


@dataclass(frozen=True, repr=False)
class ThreeTermLoss(EntryLoss):
    """`MSE + lambda_cosine * (1 - cosine) + lambda_task * task`, the first two whitened, by head, of keys and values.

    `task` comes with the aids: a loss of the mapped cache through the real receiver, such as `full_text_kl(...).loss`.
    The seed's task term is the cross-entropy of hard labels from a head that nothing trains; here the receiver answers.
    """

    name: ClassVar[str] = "three_term"
    lambda_cosine: float = 0.5
    lambda_task: float = 1.0
    whiten: Whiten = field(default="channel", kw_only=True)

    def __post_init__(self) -> None:
        if min(self.lambda_cosine, self.lambda_task) < 0:
            what = f"three_term({self.lambda_cosine}, {self.lambda_task})"
            raise BadSpec(what, cure="Weights are at least 0")

    @property
    def needs(self) -> frozenset[Aid]:
        task: frozenset[Aid] = frozenset({"task"} if self.lambda_task else ())
        return super().needs | task

    def compare(self, predicted: Vectors, target: Vectors) -> tuple[PerVector, dict[str, PerVector]]:
        """The first two terms."""
        error = squared_error(predicted, target)
        turned, cosine = direction(predicted, target, EPSILON)
        return error + self.lambda_cosine * turned, {"mse": error, "cos_sim": cosine}

    def on_cache(self, predicted: KV, target: KV, aids: Aids) -> Terms:
        loss, told = super().on_cache(predicted, target, aids)
        if not self.lambda_task:
            return loss, told
        if aids.task is None:
            raise missing(self, "task")
        task = aids.task(predicted)
        return loss + self.lambda_task * task, {**told, "task": task.detach()}
