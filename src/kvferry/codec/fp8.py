"""Eight-bit floats of the Open Compute Project (OFP8, arXiv:2209.05433) under a scale that uses their whole range.

Caveat: half of the bits go to the exponent; at the same size `int(bits=8)` with small groups has the smaller error,
`fp8` with one scale per head keeps small numbers beside large ones.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kvferry.codec.groups import Axis, Grouping, Packing, ScaleFormat
from kvferry.codec.scaled import Scaled
from kvferry.errors import BadSpec

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, repr=False)
class Fp8(Scaled):
    """Floats of 4 exponent and 3 mantissa bits (finite up to 448) or 5 and 2 (up to 57344), rounded to nearest even.

    Numbers beyond the last one saturate; NaN and infinity are never written. `axis` and `group` as in `Grouping`.

    >>> Fp8("e5m2").top, Fp8().block_bytes(heads=2, tokens=3, dim=4)
    (57344.0, 28)
    """

    name: ClassVar[str] = "fp8"
    format: Literal["e4m3", "e5m2"] = "e4m3"
    group: int = 0
    axis: Axis = "head"
    scale: ScaleFormat = "bfloat16"

    def __post_init__(self) -> None:
        if self.format not in _DTYPES or self.group < 0:
            cure = "format is e4m3 or e5m2, group at least 1, or 0 for whole rows"
            raise BadSpec(f"fp8(format={self.format}, group={self.group})", cure=cure)
        super().__post_init__()

    @property
    def packing(self) -> Packing:
        return Packing(Grouping(self.axis, self.group), self.scale, 8)

    @property
    def top(self) -> float:
        return torch.finfo(_DTYPES[self.format]).max

    def codes(self, units: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
        return units.clamp(-self.top, self.top).to(_DTYPES[self.format]).view(torch.uint8)

    def units(self, codes: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return codes.view(_DTYPES[self.format]).float()

    def forbidden(self, codes: UInt8[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        # Beyond the sign, the finite numbers have the lower patterns.
        last = torch.tensor(self.top).to(_DTYPES[self.format]).view(torch.uint8)
        return (codes & 0x7F) > last.to(codes.device)
