"""Slots by lot."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Random(TokenSelector):
    """Keeps slots by lot: what every score must beat. One seed draws the same wherever the tokens lie the same.

    >>> Random(seed=3).brief()
    'random(seed=3)'
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        shape = sight.kv.geometry.n_layers, sight.kv.n_tokens
        # From where tokens end in the text, and drawn on the CPU: the same lot on every device.
        lot = zlib.crc32(sight.kv.spans[0].end.tobytes(), self.seed & 0xFFFFFFFF)
        return torch.rand(shape, generator=torch.Generator().manual_seed(lot)).to(sight.kv.device)
