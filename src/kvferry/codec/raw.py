"""The values themselves, in one of three float formats: exact in float32 or in the type of the cache."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kvferry.codec.finite import all_finite
from kvferry.codec.fixed import FixedRate
from kvferry.errors import BadSpec, Malformed, NotFinite

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, repr=False)
class Raw(FixedRate):
    """Each value rounded to `dtype`, to nearest, ties to even. A value too large for it raises `NotFinite`.

    >>> Raw("bfloat16").block_bytes(2, 3, 4)
    48
    """

    name: ClassVar[str] = "raw"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise BadSpec(f"raw(dtype={self.dtype})", cure=f"Choose one of {', '.join(_DTYPES)}")
        super().__post_init__()

    def block_bytes(self, heads: int, tokens: int, dim: int) -> int:
        return heads * tokens * dim * _DTYPES[self.dtype].itemsize

    def write(self, block: Float[Tensor, "heads tokens dim"]) -> UInt8[Tensor, " bytes"]:
        narrow = block.to(_DTYPES[self.dtype])
        if not all_finite(narrow):
            largest = float(block.abs().max())
            raise NotFinite(
                f"a value of {largest:.4g} is infinite in {self.dtype}", cure="Use raw(dtype=float32)"
            )
        return narrow.flatten().view(torch.uint8)

    def read(
        self, data: UInt8[Tensor, " bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "heads tokens dim"]:
        block = data.view(_DTYPES[self.dtype]).reshape(shape).float()
        if not all_finite(block):
            raise Malformed(f"{math.prod(shape)} raw values hold NaN or infinity", cure="Send finite values")
        return block

    def through(
        self,
        values: Float[Tensor, "layers batch heads tokens dim"],
        present: Bool[Tensor, "layers batch tokens"],
    ) -> Float[Tensor, "layers batch heads tokens dim"]:
        return values.to(_DTYPES[self.dtype]).float()
