"""Slots by lot."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Random(TokenSelector):
    """Keeps slots by lot: what every score must beat. One seed draws the same for all sequences of one length.

    >>> Random(seed=3).brief()
    'random(seed=3)'
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        shape = sight.kv.geometry.n_layers, sight.kv.n_tokens
        # Drawn on the CPU: the same lot on every device.
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed)).to(sight.kv.device)
