"""Codes of 2, 3, 4, 6 or 8 bits, packed: code `i` is bits `i * bits` and up of one little-endian string of bits."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad

from kvferry.errors import Malformed

_CODES = 8
"""So many codes of any width fill whole bytes."""


def packed_length(n_codes: int, bits: int) -> int:
    """Bytes of `n_codes` codes: the last one may be partly used, its other bits are 0.

    >>> packed_length(9, 3)
    4
    """
    return -(-n_codes * bits // 8)


def pack_codes(codes: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """The bytes of codes, of which only the lowest `bits` bits count.

    >>> pack_codes(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist()
    [33, 15]
    """
    if bits == 8:
        return codes
    if bits == 4:  # the same, much faster
        even = pad(codes & 0xF, (0, len(codes) % 2))
        return even[0::2] | even[1::2] << 4
    rows = pad(codes & (1 << bits) - 1, (0, -len(codes) % _CODES)).reshape(-1, _CODES).long()
    strings = (rows << bits * torch.arange(_CODES, device=codes.device)).sum(-1, keepdim=True)
    rows = strings >> 8 * torch.arange(bits, device=codes.device) & 0xFF
    return rows.to(torch.uint8).flatten()[: packed_length(len(codes), bits)]


def unpack_codes(packed: UInt8[Tensor, " bytes"], bits: int, n_codes: int) -> UInt8[Tensor, " n"]:
    """The inverse, each code as a number below `2**bits`; `Malformed` if an unused bit is not 0.

    >>> unpack_codes(torch.tensor([33, 15], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 15]
    """
    if bits == 8:
        return packed
    if bits == 4:
        codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten()
    else:
        rows = pad(packed, (0, -len(packed) % bits)).reshape(-1, bits).long()
        strings = (rows << 8 * torch.arange(bits, device=packed.device)).sum(-1, keepdim=True)
        rows = strings >> bits * torch.arange(_CODES, device=packed.device) & (1 << bits) - 1
        codes = rows.to(torch.uint8).flatten()
    if bool(codes[n_codes:].any()):
        raise Malformed("an unused bit behind the last code is not 0", cure="Fill the last byte with zeros")
    return codes[:n_codes]
