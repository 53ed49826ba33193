"""Slots by the length of their values at the receiver."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.receiver_space import as_seen, of_sender
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class ProjVnorm(TokenSelector):
    """Keeps the slots whose values are long once they are mapped. `vnorm` needs no map and is the one to beat.

    >>> ProjVnorm(proportion=0.5).brief()
    'proj_vnorm(proportion=0.5)'
    """

    name: ClassVar[str] = "proj_vnorm"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        seen = as_seen(sight)
        return of_sender(sight, seen, lambda layer: [seen.layer(layer)[1][0].float().norm(dim=-1).mean(0)])
