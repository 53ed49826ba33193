"""Slots that tell the receiver what it would not expect."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.receiver_space import Entry, as_seen, distances, of_sender
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
            keys, values = seen.layer(layer)
            entry = keys[0], values[0]
            return distances(entry, _mean(entry, seen.present[layer, 0]))

        return of_sender(sight, seen, sizes)


def _mean(entry: Entry, held: Bool[Tensor, " slots"]) -> Entry:
    keys, values = (
        part.float().masked_fill(~held.unsqueeze(-1), 0.0).sum(1, keepdim=True) / held.sum().clamp(min=1)
        for part in entry
    )
    return keys, values
