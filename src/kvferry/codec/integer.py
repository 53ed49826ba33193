"""Symmetric integers with one scale per group: absmax quantisation, as in LLM.int8 (arXiv:2208.07339).

Caveat: one outlier in a group coarsens the whole group; keys have outlier channels, so for them groups along tokens
(`axis=channel`, as KIVI does, arXiv:2402.02750) lose less at 4 bits.

    block -rows along the axis-> groups -/ scale-> codes -pack-> [all scales fp16][all codes]
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Float16, Int8, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from kvferry.codec.fixed import FixedRate
from kvferry.errors import BadSpec, Malformed

_SMALLEST, _LARGEST = 2.0**-24, 65504.0
"""The range of positive float16 numbers; scales outside it are clamped, so none is zero or infinite."""


@dataclass(frozen=True, repr=False)
class Int(FixedRate):
    """Integers of 8 or 4 bits. The error is at most half a scale, plus the float16 rounding of the scale.

    `axis=token`: groups of `group` neighbouring channels of one head and token. `axis=channel`: groups of `group`
    consecutive tokens of one head and channel. The last group of a row may be short.

    >>> Int(bits=4, group=4).block_bytes(heads=1, tokens=3, dim=3)  # 3 scales of 2 bytes, 9 codes in 5 bytes
    11
    """

    name: ClassVar[str] = "int"
    bits: Literal[8, 4] = 8
    group: int = 32
    axis: Literal["token", "channel"] = "token"

    def __post_init__(self) -> None:
        if self.bits not in (8, 4) or self.group < 1 or self.axis not in ("token", "channel"):
            what = f"int(bits={self.bits}, group={self.group}, axis={self.axis})"
            raise BadSpec(what, cure="bits is 8 or 4, group at least 1, axis token or channel")

    def block_bytes(self, heads: int, tokens: int, dim: int) -> int:
        rows, length = (heads * tokens, dim) if self.axis == "token" else (heads * dim, tokens)
        return 2 * rows * -(-length // self.group) + -(-heads * tokens * dim * self.bits // 8)

    def write(self, block: Float[Tensor, "heads tokens dim"]) -> UInt8[Tensor, " bytes"]:
        codes, scales = self._quantise(self._turn(block.float()))
        flat = codes.to(torch.int8).flatten().view(torch.uint8)
        packed = flat if self.bits == 8 else _pack_nibbles(flat)
        return torch.cat([scales.flatten().view(torch.uint8), packed])

    def read(
        self, data: UInt8[Tensor, " bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "heads tokens dim"]:
        heads, tokens, dim = shape
        rows = (heads, tokens, dim) if self.axis == "token" else (heads, dim, tokens)
        n_codes = heads * tokens * dim
        cut = len(data) - -(-n_codes * self.bits // 8)
        # The copy starts at an even address, which a view as float16 needs.
        scales = data[:cut].clone().view(torch.float16).reshape(*rows[:2], -(-rows[2] // self.group))
        codes = data[cut:].view(torch.int8) if self.bits == 8 else _unpack_nibbles(data[cut:], n_codes)
        self._check(codes, scales)
        return self._turn(self._dequantise(codes.reshape(rows), scales))

    def through(
        self,
        values: Float[Tensor, "layers batch heads tokens dim"],
        present: Bool[Tensor, "layers batch tokens"],
    ) -> Float[Tensor, "layers batch heads tokens dim"]:
        if self.axis == "token":
            return self._dequantise(*self._quantise(values))
        # Groups are counted over the tokens that are there: they are moved to the front, and back afterwards.
        order = torch.argsort(present.logical_not().byte(), dim=-1, stable=True)
        rows = _reorder(values, order).transpose(-1, -2)
        return _reorder(self._dequantise(*self._quantise(rows)).transpose(-1, -2), order.argsort(dim=-1))

    def _turn(self, block: Float[Tensor, "heads rows columns"]) -> Float[Tensor, "heads ..."]:
        return block if self.axis == "token" else block.transpose(-1, -2)

    def _quantise(
        self, rows: Float[Tensor, "*rows n"]
    ) -> tuple[Float[Tensor, "*rows n"], Float16[Tensor, "*rows groups"]]:
        # A tensor, not a number: some devices multiply by the reciprocal of a number, which rounds differently.
        highest = rows.new_full((), 2 ** (self.bits - 1) - 1)
        groups = self._groups(rows)
        scales = (groups.abs().amax(-1) / highest).clamp(_SMALLEST, _LARGEST).half()
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-highest, highest)
        return codes.flatten(-2)[..., : rows.shape[-1]], scales

    def _dequantise(
        self,
        codes: Float[Tensor, "*rows n"] | Int8[Tensor, "*rows n"],
        scales: Float16[Tensor, "*rows groups"],
    ) -> Float[Tensor, "*rows n"]:
        groups = self._groups(codes.float()) * scales.float().unsqueeze(-1)
        return groups.flatten(-2)[..., : codes.shape[-1]]

    def _groups(self, rows: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows groups group"]:
        length = rows.shape[-1]
        group = max(1, min(self.group, length))
        n_groups = -(-length // group)
        return pad(rows, (0, n_groups * group - length)).unflatten(-1, (n_groups, group))

    def _check(self, codes: Int8[Tensor, " codes"], scales: Float16[Tensor, "*rows"]) -> None:
        lowest = -(2 ** (self.bits - 1))
        if bool((codes == lowest).any()):
            raise Malformed(
                f"an int{self.bits} code is {lowest}", cure=f"Codes are symmetric, from {lowest + 1}"
            )
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise Malformed(
                "a scale is zero, negative or not finite", cure=f"Scales are {_SMALLEST} to {_LARGEST}"
            )


def _reorder(
    values: Float[Tensor, "layers batch heads tokens dim"],
    order: Int64[Tensor, "layers batch tokens"],
) -> Float[Tensor, "layers batch heads tokens dim"]:
    return values.gather(3, order[:, :, None, :, None].expand_as(values))


def _pack_nibbles(codes: UInt8[Tensor, " n"]) -> UInt8[Tensor, " half"]:
    even = pad(codes & 0xF, (0, len(codes) % 2))
    return even[0::2] | even[1::2] << 4


def _unpack_nibbles(packed: UInt8[Tensor, " half"], n: int) -> Int8[Tensor, " n"]:
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten()
    if bool(nibbles[n:].any()):
        raise Malformed("the unused half of the last byte is not 0", cure="Fill it with zeros")
    # Two's complement of four bits: 8 to 15 stand for -8 to -1.
    return (nibbles[:n] ^ 8).view(torch.int8) - 8
