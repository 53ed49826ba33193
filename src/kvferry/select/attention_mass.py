"""Slots by the attention that they received while the context was read."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.kv import Need
from kvferry.select.attention import on_slots, received
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class AttentionMass(TokenSelector):
    """Keeps the heavy hitters (Zhang et al., H2O, arXiv:2306.14048), the mean over heads.

    H2O adds attention up, which favours slots that many queries could see. Here it is divided by their number.

    >>> AttentionMass(proportion=0.5).brief()
    'attention_mass(proportion=0.5)'
    """

    name: ClassVar[str] = "attention_mass"
    needs: ClassVar[tuple[Need, ...]] = ("attention_mass",)

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        return on_slots(sight, lambda layer: received(sight, layer).mean(0))
