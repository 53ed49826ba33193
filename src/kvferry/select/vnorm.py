"""Slots by the length of their values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Vnorm(TokenSelector):
    """Keeps the slots whose values are long: what is read of them weighs most. The mean over heads counts.

    >>> Vnorm(proportion=0.5).brief()
    'vnorm(proportion=0.5)'
    """

    name: ClassVar[str] = "vnorm"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        values = (sight.kv.layer(layer)[1] for layer in range(sight.kv.geometry.n_layers))
        return torch.stack([one[0].float().norm(dim=-1).mean(0) for one in values])
