"""NormalFloat: 16 levels at the quantiles of a normal distribution, from QLoRA (arXiv:2305.14314).

Caveat: the levels suit normal numbers with absmax scales; on other ones `int(bits=4)` may lose less.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvferry.codec.groups import Grouping, Packing, ScaleFormat
from kvferry.codec.scaled import Scaled
from kvferry.errors import BadSpec

LEVELS = (
    -1.0,
    -0.6961928,
    -0.52507293,
    -0.39491743,
    -0.28444132,
    -0.1847734,
    -0.09104998,
    0.0,
    0.079580314,
    0.16093014,
    0.24611226,
    0.33791512,
    0.44070974,
    0.5626169,
    0.72295666,
    1.0,
)
"""With Q the quantiles of N(0, 1) and a = 1 - (1/30 + 1/32) / 2: -Q at 8 even steps from a down to 1/2, Q at 9 such
steps, one of the two zeros, all divided by Q(a); as float32."""


@dataclass(frozen=True, repr=False)
class Nf4(Scaled):
    """4-bit NormalFloat: each number is the nearest level times the peak of its group.

    Groups are `block` contiguous numbers of a block of keys or values in order `[head, token, dim]`.

    >>> Nf4(block=64).block_bytes(heads=1, tokens=2, dim=64)  # 2 scales of 2 bytes, 128 codes
    68
    """

    name: ClassVar[str] = "nf4"
    block: int = 64
    scale: ScaleFormat = "float16"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise BadSpec(f"nf4(block={self.block})", cure="block is at least 1; QLoRA takes 64")
        super().__post_init__()

    @property
    def packing(self) -> Packing:
        return Packing(Grouping("block", self.block), self.scale, 4)

    @property
    def top(self) -> float:
        return 1.0

    def codes(self, units: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
        levels = units.new_tensor(LEVELS)
        codes = torch.zeros_like(units, dtype=torch.uint8)
        # Fifteen passes of comparisons are three times as fast as a search.
        for middle in ((levels[1:] + levels[:-1]) / 2).unbind():
            codes += units > middle
        return codes

    def units(self, codes: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.tensor(LEVELS, device=codes.device)[codes.int()]
