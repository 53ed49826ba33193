"""Slots by what the last query looks at."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.kv import Need
from kvferry.select.attention import looked, on_slots, pose_last
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Tova(TokenSelector):
    """Keeps what the last query attends to, mean over heads (Oren et al., TOVA, arXiv:2401.06104).

    TOVA drops one slot at each step of generation; here it decides once, at the end of the context.

    >>> Tova(proportion=0.5).brief()
    'tova(proportion=0.5)'
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        return on_slots(sight, lambda layer: looked(pose_last(sight, layer, 1)).mean())
