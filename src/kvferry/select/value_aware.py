"""Slots by attention and by how much there is to read."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.kv import Need
from kvferry.select.attention import on_slots, received
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class ValueAware(TokenSelector):
    """Keeps the slots of most attention received times length of the value, head by head (VATP, arXiv:2406.12335).

    An attention sink receives much and has a value near zero. VATP takes the L1 length, here it is the L2 length, as
    everywhere else; attention is divided by the number of queries that see the slot.

    >>> ValueAware(proportion=0.5).brief()
    'value_aware(proportion=0.5)'
    """

    name: ClassVar[str] = "value_aware"
    needs: ClassVar[tuple[Need, ...]] = ("attention_mass",)

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        def of_layer(layer: int) -> Float[Tensor, " tokens"]:
            values = sight.read.layer(layer)[1][0]
            return (received(sight, layer) * values.float().norm(dim=-1)).mean(0)

        return on_slots(sight, of_layer)
