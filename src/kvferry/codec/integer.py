"""Integers with one scale per group: absmax quantisation, as in LLM.int8 (arXiv:2208.07339).

Caveat: one outlier in a group coarsens the whole group; keys have outlier channels, so for them groups along tokens
(`axis=channel`, as KIVI does, arXiv:2402.02750) or `centred` keys lose less at 4 bits.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kvferry.codec import integer_fast
from kvferry.codec.groups import Axis, Grouping, Packing, ScaleFormat
from kvferry.codec.scaled import Scaled
from kvferry.errors import BadSpec, Malformed, NotFinite


@dataclass(frozen=True, repr=False)
class Int(Scaled):
    """Integers of 8, 6, 4, 3 or 2 bits. The error is at most half a scale, plus the rounding of the scale itself.

    8, 6 and 4 bits: a code k stands for k scales, `-top..top`, zero is exact. 3 and 2 bits: from the lowest to the
    highest, -peak to peak is cut in 2**bits equal cells, and a code stands for the middle of its cell. With so few
    levels a zero costs too much: on normal numbers in groups of 32 the squared error falls from .051 to .032 at 3
    bits and from .43 to .13 at 2, below the .154 of four levels from minimum to maximum, which need a zero point too.

    `axis` and `group` are those of `Grouping`; group=0 is one scale for a whole row. `centred` subtracts the mean of
    each channel of the keys before, and sends it.

    >>> Int(bits=4, group=4).block_bytes(heads=1, tokens=3, dim=3)  # 3 scales of 2 bytes, 9 codes in 5 bytes
    11
    """

    name: ClassVar[str] = "int"
    bits: Literal[8, 6, 4, 3, 2] = 8
    group: int = 32
    axis: Axis = "token"
    centred: bool = False
    scale: ScaleFormat = "float16"

    def __post_init__(self) -> None:
        if self.bits not in (8, 6, 4, 3, 2) or self.group < 0:
            cure = "bits is 8, 6, 4, 3 or 2, group at least 1, or 0 for whole rows"
            raise BadSpec(f"int(bits={self.bits}, group={self.group})", cure=cure)
        super().__post_init__()

    @property
    def packing(self) -> Packing:
        return Packing(Grouping(self.axis, self.group), self.scale, self.bits)

    @property
    def subtracts_means(self) -> bool:
        return self.centred

    @property
    def top(self) -> float:
        return 2.0 ** (self.bits - 1) - (0 if self._cells else 1)

    @property
    def _cells(self) -> bool:
        return self.bits < 4

    @property
    def _middle(self) -> float:
        """Where in its cell a code's number lies, above the code."""
        return 0.5 if self._cells else 0.0

    @property
    def _range(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        return -self.top, self.top - (1 if self._cells else 0)

    def write_layers(self, values: Float[Tensor, "layers heads tokens dim"]) -> UInt8[Tensor, "layers bytes"]:
        if not integer_fast.takes(values):
            return super().write_layers(values)
        data = integer_fast.write(
            values, self.packing.grouping, self.scale, self.bits, (self.top, *self._range)
        )
        if data is None:
            raise NotFinite("a number is NaN or infinite", cure="Check the model's dtype: fp16 overflows")
        return data

    def read_layers(
        self, data: UInt8[Tensor, "layers bytes"], out: Float[Tensor, "layers heads tokens dim"]
    ) -> None:
        if not integer_fast.takes(out):
            return super().read_layers(data, out)
        scales = self.scales(data, *out.shape[1:]).float()
        if not integer_fast.read(data, scales, self.packing.grouping, self.bits, self._middle, out):
            raise Malformed(f"a code or an unused bit that {self!r} never writes", cure="Send it again")
        return None

    def codes(self, units: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
        whole = units.floor() if self._cells else units.round()
        return whole.clamp(*self._range).to(torch.int8).view(torch.uint8)

    def units(self, codes: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        # Two's complement of so many bits, as one of 8 bits.
        sign = 1 << self.bits - 1
        return ((codes & 2 * sign - 1) ^ sign).float() - sign + self._middle

    def forbidden(self, codes: UInt8[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        return (codes == 1 << self.bits - 1) & (not self._cells)
