"""The slots in the middle."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Middle(TokenSelector):
    """Keeps what lies nearest to the middle of the text: a control beside `front` and `back`.

    >>> Middle(proportion=0.25).brief()
    'middle(proportion=0.25)'
    """

    name: ClassVar[str] = "middle"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        n_slots = sight.kv.n_tokens
        slots = torch.arange(n_slots, device=sight.kv.device, dtype=torch.float32)
        return -(slots - (n_slots - 1) / 2).abs().expand(sight.kv.geometry.n_layers, -1)
