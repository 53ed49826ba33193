"""Codecs that divide each group by a scale and code the quotients: `int`, `nf4`, `fp8`.

block -rows along the axis-> groups -/ scale-> units -> codes -pack-> [all scales][all codes]
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from kvferry.codec.bits import pack_codes, packed_length, unpack_codes
from kvferry.codec.fixed import FixedRate
from kvferry.codec.groups import SCALE_DTYPES, Packing, highest_scale, scales_of
from kvferry.errors import Malformed

_SCALE_BYTES = 2


@dataclass(frozen=True, repr=False)
class Scaled(FixedRate):
    """A codec whose members only say which number between `-top` and `top` a code stands for."""

    @property
    @abstractmethod
    def packing(self) -> Packing:
        """Groups, scales and codes of a block."""

    @property
    @abstractmethod
    def top(self) -> float:
        """What the largest number of a group becomes when it is divided by the scale."""

    @abstractmethod
    def codes(self, units: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
        """The code of each quotient; whatever lies beyond the last level takes the last one."""

    @abstractmethod
    def units(self, codes: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The number that a code stands for, float32. Only the lowest `code_bits` bits of a code count."""

    def forbidden(self, codes: UInt8[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        """Codes that are never written."""
        return torch.zeros_like(codes, dtype=torch.bool)

    def block_bytes(self, heads: int, tokens: int, dim: int) -> int:
        n_scales = self.packing.grouping.n_groups(heads, tokens, dim)
        return _SCALE_BYTES * n_scales + packed_length(heads * tokens * dim, self.packing.code_bits)

    def write(self, block: Float[Tensor, "heads tokens dim"]) -> UInt8[Tensor, " bytes"]:
        codes, scales = self._quantise(self.packing.grouping.cut(block.float()))
        packed = pack_codes(codes.flatten(), self.packing.code_bits)
        return torch.cat([scales.flatten().view(torch.uint8), packed])

    def read(
        self, data: UInt8[Tensor, " bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "heads tokens dim"]:
        n_rows, length = self.packing.grouping.rows(*shape)
        scales = self.scales(data.unsqueeze(0), *shape).reshape(n_rows, -1)
        codes = unpack_codes(data[_SCALE_BYTES * scales.numel() :], self.packing.code_bits, n_rows * length)
        wrong = self.forbidden(codes)
        if bool(wrong.any()):
            code = int(codes[wrong][0])
            raise Malformed(f"code {code:#04x} has no meaning", cure=f"{self!r} never writes it")
        return self.packing.grouping.join(self._dequantise(codes.reshape(n_rows, length), scales), shape)

    def scales(
        self, data: UInt8[Tensor, "layers bytes"], heads: int, tokens: int, dim: int
    ) -> Shaped[Tensor, "layers groups"]:
        """The scales at the front of blocks; `Malformed` unless all could have been written."""
        dtype = SCALE_DTYPES[self.packing.scale]
        # A copy starts at an even address, which a view as 16-bit numbers needs.
        front = data.new_empty(len(data), _SCALE_BYTES * self.packing.grouping.n_groups(heads, tokens, dim))
        scales = front.copy_(data[:, : front.shape[1]]).view(dtype)
        # Positive floats have positive patterns, in the same order; NaN comes behind infinity.
        lowest, highest = scales.view(torch.int16).aminmax()
        limit = highest_scale(self.top, self.packing.scale)
        if lowest <= 0 or highest > torch.tensor(limit, dtype=dtype).view(torch.int16):
            cure = f"Write positive scales up to {limit:.6g}: numbers stay finite"
            raise Malformed("a scale is zero, negative or too large", cure=cure)
        return scales

    def through(
        self,
        values: Float[Tensor, "layers batch heads tokens dim"],
        present: Bool[Tensor, "layers batch tokens"],
    ) -> Float[Tensor, "layers batch heads tokens dim"]:
        grouping = self.packing.grouping
        if grouping.axis == "token":
            return self._dequantise(*self._quantise(values))
        together, order = grouping.together(values, present)
        rows = self._dequantise(*self._quantise(grouping.cut(together)))
        heads, slots, dim = together.shape[-3:]
        return grouping.apart(grouping.join(rows, (heads, slots, dim)), order, values.shape[2])

    def _quantise(
        self, rows: Float[Tensor, "*rows n"]
    ) -> tuple[UInt8[Tensor, "*rows n"], Shaped[Tensor, "*rows groups"]]:
        groups = self.packing.grouping.split(rows)
        scales = scales_of(groups.abs().amax(-1), self.top, self.packing.scale)
        codes = self.codes(groups / scales.float().unsqueeze(-1))
        return codes.flatten(-2)[..., : rows.shape[-1]], scales

    def _dequantise(
        self, codes: UInt8[Tensor, "*rows n"], scales: Shaped[Tensor, "*rows groups"]
    ) -> Float[Tensor, "*rows n"]:
        groups = self.packing.grouping.split(self.units(codes)) * scales.float().unsqueeze(-1)
        return groups.flatten(-2)[..., : codes.shape[-1]]
