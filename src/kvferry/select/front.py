"""The first slots."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Front(TokenSelector):
    """Keeps the start of the text: the control for `back`, and good where the start sums up the rest.

    >>> Front(proportion=0.25).brief()
    'front(proportion=0.25)'
    """

    name: ClassVar[str] = "front"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        slots = torch.arange(sight.kv.n_tokens, device=sight.kv.device, dtype=torch.float32)
        return -slots.expand(sight.kv.geometry.n_layers, -1)
