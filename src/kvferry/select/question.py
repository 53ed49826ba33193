"""Slots by what the question looks at."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.select.attention import looked, on_slots, pooled, pose
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Question(TokenSelector):
    """Keeps what the sender's own queries attend to while it reads the receiver's question after the context.

    The question travels first, and its bytes count. `reduce` is over the tokens of the question: the most that any
    gives or the mean, after the mean over query heads; `pool` (odd) averages neighbours. Weights are shares of the
    attention to what was read before the question: what goes to the question itself says nothing about the slots.
    Shares compare from layer to layer, so slots that all layers keep alike have the largest that any layer gives them.

    >>> Question(reduce="mean").brief()
    'question(reduce=mean)'
    """

    name: ClassVar[str] = "question"
    reads_question: ClassVar[bool] = True
    reduce: Literal["max", "mean"] = "max"
    pool: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < 1 or self.pool % 2 == 0:
            raise BadSpec(f"question(pool={self.pool})", cure="pool is an odd number")

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        found = on_slots(sight, lambda layer: pooled(sight, self._of_layer(sight, layer), self.pool))
        return found if self.per_layer else found.amax(0).expand_as(found)

    def _of_layer(self, sight: Sight, layer: int) -> Float[Tensor, " tokens"]:
        asked = sight.require_asked()
        found = looked(pose(sight, layer, asked.queries[layer], asked.positions.unsqueeze(0)))
        return found.weights.mean(0).amax(0) if self.reduce == "max" else found.mean()
