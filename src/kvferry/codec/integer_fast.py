"""`int` on the CPU where numba is installed: the same bytes and numbers as the torch path.

Magnitudes are compared as bit patterns: of two the larger number has the larger pattern, and infinity and NaN have
the largest of all, so one pass finds the peak of a group and whether it is finite.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt32
from torch import Tensor

from kvferry.codec import fast
from kvferry.codec.bits import packed_length
from kvferry.codec.groups import Grouping, ScaleFormat, scales_of

SMALLEST = 1 << 16
"""Below so many numbers, compiling or loading what was compiled takes longer than it saves."""
_INFINITE = 0x7F800000
_SPARE = 8
"""Codes of any width are packed by eights."""


def takes(values: Tensor) -> bool:
    """Whether these numbers are on the CPU, are many, and numba is here."""
    return values.device.type == "cpu" and values.numel() >= SMALLEST and fast.available()


def write(
    values: Float[Tensor, "layers heads tokens dim"],
    grouping: Grouping,
    scale: ScaleFormat,
    bits: int,
    limits: tuple[float, float, float],
) -> UInt8[Tensor, "layers bytes"] | None:
    """The blocks that `Int.write` gives; None if a number is NaN or infinite.

    `limits` are what the largest number of a group becomes, the lowest and the highest code.
    """
    n_rows, length = grouping.rows(*values.shape[1:])
    group = grouping.group or length
    rows = _rows(values, grouping)
    peaks = np.empty((len(rows), grouping.n_groups(*values.shape[1:])), np.uint32)
    fast.compiled(_peaks)(rows, length, group, peaks)
    if peaks.max() >= _INFINITE:
        return None
    top, lowest, highest = limits
    sent = scales_of(torch.from_numpy(peaks.view(np.float32)), top, scale)
    codes = np.empty((len(rows), n_rows * length + _SPARE), np.int8)
    codes[:, -_SPARE:] = 0
    ends = (np.float32(lowest), np.float32(highest))
    fast.compiled(_quantise)(
        rows.view(np.float32), sent.float().numpy(), length, group, *ends, top > highest, codes
    )
    front = sent.view(torch.uint8).numpy()
    cut = front.shape[1]
    out = np.empty((len(rows), cut + packed_length(n_rows * length, bits)), np.uint8)
    out[:, :cut] = front
    fast.compiled(_pack)(codes, bits, cut, out)
    return torch.from_numpy(out)


def read(
    data: UInt8[Tensor, "layers bytes"],
    scales: Float[Tensor, "layers groups"],
    grouping: Grouping,
    bits: int,
    middle: float,
    out: Float[Tensor, "layers heads tokens dim"],
) -> bool:
    """Fill `out` with the numbers that `Int.read` gives; false if a code or an unused bit is not one that is written.

    `middle` is what is added to each code.
    """
    n_rows, length = grouping.rows(*out.shape[1:])
    codes = np.empty((len(out), n_rows * length + _SPARE), np.int8)
    lowest = fast.compiled(_unpack)(data.numpy(), bits, 2 * scales.shape[1], codes)
    turned = grouping.axis == "channel" or not out.is_contiguous()
    rows = torch.empty(len(out), n_rows * length) if turned else out.flatten(1)
    group = grouping.group or length
    fast.compiled(_dequantise)(codes, scales.numpy(), length, group, np.float32(middle), rows.numpy())
    if turned:
        heads, tokens, dim = out.shape[1:]
        out.copy_(grouping.join(rows.unflatten(1, (n_rows, length)), (heads, tokens, dim)))
    return bool(lowest >= -(1 << bits - 1) + (0 if middle else 1))


def _rows(
    values: Float[Tensor, "layers heads tokens dim"], grouping: Grouping
) -> UInt32[np.ndarray, "layers n"]:
    """Bit patterns of float32, row after row; of the cache itself where it holds them so."""
    rows = grouping.cut(values.float()).flatten(1).contiguous()
    return rows.detach().numpy().view(np.uint32)


def _peaks(rows: Any, length: int, group: int, peaks: Any) -> None:
    """The largest magnitude of each group, as a bit pattern."""
    for layer in range(len(rows)):
        line, found = rows[layer], peaks[layer]
        g = 0
        for row in range(0, len(line), length):
            for start in range(row, row + length, group):
                piece = line[start : min(start + group, row + length)]
                peak = np.uint32(0)
                for i in range(len(piece)):
                    magnitude = piece[i] & np.uint32(0x7FFFFFFF)
                    peak = magnitude if magnitude > peak else peak
                found[g] = peak
                g += 1


def _quantise(
    rows: Any, scales: Any, length: int, group: int, lowest: Any, highest: Any, cells: bool, codes: Any
) -> None:
    for layer in range(len(rows)):
        line, into, scale_of = rows[layer], codes[layer], scales[layer]
        g = 0
        for row in range(0, len(line), length):
            for start in range(row, row + length, group):
                stop = min(start + group, row + length)
                piece, these, scale = line[start:stop], into[start:stop], scale_of[g]
                g += 1
                for i in range(len(piece)):
                    unit = piece[i] / scale
                    # Limits first: the compiler knows then that the number fits, and does many at once.
                    unit = unit if unit < highest + np.float32(0.5) else highest
                    unit = unit if unit > lowest else lowest
                    these[i] = np.int32(np.floor(unit) if cells else np.rint(unit))


def _pack(codes: Any, bits: int, skip: int, out: Any) -> None:
    mask = (1 << bits) - 1
    for layer in range(len(codes)):
        code, body = codes[layer], out[layer, skip:]
        if bits == 8:
            for i in range(len(body)):
                body[i] = code[i]
        elif bits == 4:
            for i in range(len(body)):
                body[i] = (code[2 * i] & 15) | (code[2 * i + 1] & 15) << 4
        else:
            for start in range(0, len(body), bits):
                string = 0
                for i in range(8):
                    string |= (code[start // bits * 8 + i] & mask) << i * bits
                for i in range(min(bits, len(body) - start)):
                    body[start + i] = string >> 8 * i & 0xFF


def _unpack(data: Any, bits: int, skip: int, codes: Any) -> np.int8:
    """Codes as numbers; returns the lowest of all, or -128 if a bit behind the last one is set."""
    sign = 1 << (bits - 1)
    n_codes = codes.shape[1] - _SPARE
    lowest = np.int8(0)
    for layer in range(len(data)):
        body, code = data[layer, skip:], codes[layer]
        if bits == 8:
            for i in range(len(body)):
                code[i] = np.int8(body[i])
        elif bits == 4:
            for i in range(len(body)):
                code[2 * i] = np.int8((body[i] & 15) ^ 8) - np.int8(8)
                code[2 * i + 1] = np.int8((body[i] >> 4) ^ 8) - np.int8(8)
        else:
            for start in range(0, len(body), bits):
                string = 0
                for i in range(min(bits, len(body) - start)):
                    string |= np.int64(body[start + i]) << 8 * i
                for i in range(_SPARE):
                    code[start // bits * 8 + i] = (string >> i * bits & 2 * sign - 1 ^ sign) - sign
        filled = len(body) * (8 // bits) if bits > 3 else (len(body) + bits - 1) // bits * 8
        used, unused = code[:n_codes], code[n_codes:filled]
        for i in range(len(used)):
            lowest = used[i] if used[i] < lowest else lowest
        for i in range(len(unused)):
            lowest = lowest if unused[i] == 0 else np.int8(-128)
    return lowest


def _dequantise(codes: Any, scales: Any, length: int, group: int, middle: np.float32, rows: Any) -> None:
    for layer in range(len(rows)):
        line, into, scale_of = codes[layer], rows[layer], scales[layer]
        g = 0
        for row in range(0, len(into), length):
            for start in range(row, row + length, group):
                stop = min(start + group, row + length)
                piece, these, scale = line[start:stop], into[start:stop], scale_of[g]
                g += 1
                for i in range(len(piece)):
                    these[i] = (np.float32(piece[i]) + middle) * scale
