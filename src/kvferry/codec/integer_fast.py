"""`int` on the CPU where numba is installed: the same bytes and numbers as the torch path, a few layers at a time.

Magnitudes are compared as bit patterns: of two the larger number has the larger pattern, and infinity and NaN have
the largest of all, so one pass finds the peak of a group and whether it is finite.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8, UInt32
from torch import Tensor

from kvferry.codec import fast
from kvferry.codec.groups import SCALE_DTYPES, SCALE_RANGES, Grouping, ScaleFormat

SMALLEST = 1 << 16
"""Below so many numbers, compiling or loading what was compiled takes longer than it saves."""
_AT_ONCE = 1 << 18
"""So many numbers, 1 MiB, are coded at once: they stay in the cache of the processor between the passes."""
_INFINITE = 0x7F800000
_DROPPED = {"float16": 13, "bfloat16": 16}
"""Bits of a float32 mantissa that the other has not."""
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
    out: UInt8[np.ndarray, "layers bytes"],
) -> bool:
    """Fill `out` with the blocks that `Int.write` gives; false if a number is NaN or infinite.

    `limits` are the top, the lowest and the highest code.
    """
    n_rows, length = grouping.rows(*values.shape[1:])
    group = grouping.group or length
    top, lowest, highest = (np.float32(limit) for limit in limits)
    smallest, largest = (np.float32(limit) for limit in SCALE_RANGES[scale])
    n_scales = grouping.n_groups(*values.shape[1:])
    worst = 0
    for layers in _chunks(len(values), n_rows * length):
        rows = _rows(values[layers], grouping)
        scales = np.empty((len(rows), n_scales), np.float32)
        kernel = fast.compiled(_scales)
        worst = max(worst, kernel(rows, length, group, (top, smallest, largest), _DROPPED[scale], scales))
        sent = torch.from_numpy(scales).to(SCALE_DTYPES[scale]).view(torch.uint8).numpy()
        out[layers, : sent.shape[1]] = sent
        codes = np.zeros((len(rows), n_rows * length + _SPARE), np.int8)
        kernel = fast.compiled(_quantise)
        kernel(rows.view(np.float32), scales, length, group, (lowest, highest), top != highest, codes)
        fast.compiled(_pack)(codes, bits, out[layers], 2 * n_scales)
    return worst < _INFINITE


def read(
    data: UInt8[np.ndarray, "layers bytes"],
    scales: Float32[np.ndarray, "layers groups"],
    grouping: Grouping,
    bits: int,
    middle: float,
    out: Float[Tensor, "layers heads tokens dim"],
) -> bool:
    """Fill `out` with the numbers that `Int.read` gives; false if a code or an unused bit is not one that is written.

    `middle` is what is added to each code.
    """
    shape = (int(out.shape[1]), int(out.shape[2]), int(out.shape[3]))
    n_rows, length = grouping.rows(*shape)
    turned, good = grouping.axis == "channel", True
    for layers in _chunks(len(out), n_rows * length):
        codes = np.empty((len(data[layers]), n_rows * length + _SPARE), np.int8)
        good &= bool(fast.compiled(_unpack)(data[layers], bits, 2 * scales.shape[1], middle == 0, codes))
        rows = torch.empty(len(codes), n_rows * length) if turned else out[layers].flatten(1)
        kernel = fast.compiled(_dequantise)
        kernel(codes, scales[layers], length, grouping.group or length, np.float32(middle), rows.numpy())
        if turned:
            out[layers] = grouping.join(rows.unflatten(1, (n_rows, length)), shape)
    return good


def _chunks(n_layers: int, n_numbers: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // n_numbers)
    return (slice(start, start + step) for start in range(0, n_layers, step))


def _rows(
    values: Float[Tensor, "layers heads tokens dim"], grouping: Grouping
) -> UInt32[np.ndarray, "layers n"]:
    """Bit patterns of float32, row after row; of the cache itself where it holds them so."""
    rows = grouping.cut(values.float()).flatten(1).contiguous()
    return rows.detach().numpy().view(np.uint32)


def _scales(rows: Any, length: int, group: int, bounds: Any, drop: int, scales: Any) -> np.uint32:
    """The scale of each group, with the lowest `drop` bits rounded away; returns the largest magnitude of all."""
    top, smallest, largest = bounds
    number = np.empty(1, np.float32)
    pattern = number.view(np.uint32)
    worst = np.uint32(0)
    for layer in range(len(rows)):
        g = 0
        for row in range(0, rows.shape[1], length):
            line = rows[layer, row : row + length]
            for start in range(0, length, group):
                piece = line[start : start + group]
                peak = np.uint32(0)
                for i in range(len(piece)):
                    magnitude = piece[i] & np.uint32(0x7FFFFFFF)
                    peak = magnitude if magnitude > peak else peak
                worst = max(worst, peak)
                pattern[0] = peak
                number[0] = min(max(number[0] / top, smallest), largest)
                # To nearest, ties to even. Subnormal float16 are whole multiples of the last bit of 1/2.
                if drop == 13 and number[0] < np.float32(2.0**-14):
                    number[0] = (number[0] + np.float32(0.5)) - np.float32(0.5)
                else:
                    odd = pattern[0] >> drop & 1
                    pattern[0] = (pattern[0] + (1 << (drop - 1)) - 1 + odd) >> drop << drop
                scales[layer, g] = number[0]
                g += 1
    return worst


def _quantise(rows: Any, scales: Any, length: int, group: int, bounds: Any, cells: bool, codes: Any) -> None:
    lowest, highest = bounds
    for layer in range(len(rows)):
        g = 0
        for row in range(0, rows.shape[1], length):
            line, into = rows[layer, row : row + length], codes[layer, row : row + length]
            for start in range(0, length, group):
                piece, these = line[start : start + group], into[start : start + group]
                scale = scales[layer, g]
                g += 1
                for i in range(len(piece)):
                    unit = piece[i] / scale
                    # Limits first: the compiler knows then that the number fits, and does many at once.
                    unit = unit if unit < highest + np.float32(0.5) else highest
                    unit = unit if unit > lowest else lowest
                    these[i] = np.int32(np.floor(unit) if cells else np.rint(unit))


def _pack(codes: Any, bits: int, out: Any, skip: int) -> None:
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


def _unpack(data: Any, bits: int, skip: int, signed: bool, codes: Any) -> bool:
    """Codes as numbers; false if a bit behind the last one is set, or a lowest code where zero has one of its own."""
    sign = 1 << (bits - 1)
    n_codes = codes.shape[1] - _SPARE
    bad = np.uint8(0)
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
                for i in range(8):
                    code[start // bits * 8 + i] = (string >> i * bits & 2 * sign - 1 ^ sign) - sign
        filled = len(body) * (8 // bits) if bits > 3 else (len(body) + bits - 1) // bits * 8
        used, unused = code[:n_codes], code[n_codes:filled]
        for i in range(len(unused)):
            bad |= np.uint8(unused[i] != 0)
        if signed:
            for i in range(len(used)):
                bad |= np.uint8(used[i] == -sign)
    return bad == 0


def _dequantise(codes: Any, scales: Any, length: int, group: int, middle: np.float32, rows: Any) -> None:
    for layer in range(len(rows)):
        g = 0
        for row in range(0, rows.shape[1], length):
            line, into = codes[layer, row : row + length], rows[layer, row : row + length]
            for start in range(0, length, group):
                piece, these = line[start : start + group], into[start : start + group]
                scale = scales[layer, g]
                g += 1
                for i in range(len(piece)):
                    these[i] = (np.float32(piece[i]) + middle) * scale
