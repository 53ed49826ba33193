"""Slots that tell the receiver what it would not expect."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.receiver_space import as_seen, distance, of_sender
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Delta(TokenSelector):
    """Keeps the slots whose mapped keys and values lie furthest from the mean mapped slot.

    The mean is what a receiver that knows nothing of this text would fill in. Comparing with what the receiver really
    holds needs its cache at the sender: that is `oracle_delta`.

    >>> Delta(proportion=0.5).brief()
    'delta(proportion=0.5)'
    """

    name: ClassVar[str] = "delta"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        seen = as_seen(sight)

        def sizes(layer: int) -> list[Float[Tensor, " slots"]]:
            held = seen.present[layer, 0]
            return [distance(part[0], _mean(part[0], held)) for part in seen.layer(layer)]

        return of_sender(sight, seen, sizes)


def _mean(
    part: Float[Tensor, "heads slots dim"], held: Bool[Tensor, " slots"]
) -> Float[Tensor, "heads 1 dim"]:
    kept = part.float().masked_fill(~held.unsqueeze(-1), 0.0)
    return kept.sum(1, keepdim=True) / held.sum().clamp(min=1)
