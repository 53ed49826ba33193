"""`int` on the CPU where numba is installed: the same bytes and numbers as the torch path.

Magnitudes are compared as bit patterns: of two the larger number has the larger pattern, and infinity and NaN have
the largest of all, so one pass finds the peak of a group and whether it is finite.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kvferry.codec import fast
from kvferry.codec.bits import packed_length
from kvferry.codec.groups import Grouping, ScaleFormat, scales_of

SMALLEST = 1 << 16
"""Below so many numbers, compiling or loading what was compiled takes longer than it saves."""
_INFINITE = 0x7F800000


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
    group = min(grouping.group or length, length)  # a message may say any number
    rows, shift = _patterns(values, grouping)
    peaks = np.empty((len(rows), grouping.n_groups(*values.shape[1:])), np.uint32)
    fast.compiled(_peaks)(rows, shift, length, group, peaks)
    if peaks.max() >= _INFINITE:
        return None
    top, lowest, highest = limits
    sent = scales_of(torch.from_numpy(peaks.view(np.float32)), top, scale)
    front = sent.view(torch.uint8).numpy()
    out = np.empty((len(rows), front.shape[1] + packed_length(n_rows * length, bits)), np.uint8)
    out[:, : front.shape[1]] = front
    ends = np.float32(lowest), np.float32(highest), top > highest
    fast.compiled(_write)(rows, shift, sent.float().numpy(), length, group, *ends, bits, front.shape[1], out)
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
    turned = grouping.axis == "channel" or not out.is_contiguous()
    rows = torch.empty(len(out), n_rows * length) if turned else out.flatten(1)
    group, skip = min(grouping.group or length, length), 2 * scales.shape[1]
    lowest = fast.compiled(_read)(
        data.numpy(), skip, bits, scales.numpy(), length, group, np.float32(middle), rows.numpy()
    )
    if turned:
        heads, tokens, dim = out.shape[1:]
        out.copy_(grouping.join(rows.unflatten(1, (n_rows, length)), (heads, tokens, dim)))
    return bool(lowest >= -(1 << bits - 1) + (0 if middle else 1))


def _patterns(values: Tensor, grouping: Grouping) -> tuple[NDArray[np.uint16] | NDArray[np.uint32], int]:
    """The bits of the numbers, row after row, and how far to shift them up to be those of a float32."""
    short = values.dtype == torch.bfloat16
    rows = grouping.cut(values if short else values.float()).flatten(1).contiguous().detach()
    return rows.view(torch.uint16 if short else torch.uint32).numpy(), 16 if short else 0


def _peaks(rows: Any, shift: int, length: int, group: int, peaks: Any) -> None:
    """The largest magnitude of each group, as a bit pattern."""
    for layer in range(len(rows)):
        line, found = rows[layer], peaks[layer]
        g = 0
        for row in range(0, len(line), length):
            for start in range(row, row + length, group):
                piece = line[start : min(start + group, row + length)]
                peak = np.uint32(0)
                for i in range(len(piece)):
                    magnitude = (np.uint32(piece[i]) << np.uint32(shift)) & np.uint32(0x7FFFFFFF)
                    peak = magnitude if magnitude > peak else peak
                found[g] = peak
                g += 1


def _write(
    rows: Any,
    shift: int,
    scales: Any,
    length: int,
    group: int,
    lowest: np.float32,
    highest: np.float32,
    cells: bool,
    bits: int,
    skip: int,
    out: Any,
) -> None:
    codes = np.zeros(rows.shape[1] + 8, np.int8)
    held = np.empty(rows.shape[1], np.uint32)
    numbers = held.view(np.float32)
    mask = (1 << bits) - 1
    for layer in range(len(rows)):
        line, scale_of, body = rows[layer], scales[layer], out[layer, skip:]
        for i in range(len(line)):
            held[i] = np.uint32(line[i]) << np.uint32(shift)
        g = 0
        for row in range(0, len(line), length):
            for start in range(row, row + length, group):
                stop = min(start + group, row + length)
                piece, these, scale = numbers[start:stop], codes[start:stop], scale_of[g]
                g += 1
                for i in range(len(piece)):
                    unit = piece[i] / scale
                    # Limits first: the compiler knows then that the number fits, and does many at once.
                    unit = unit if unit < highest + np.float32(0.5) else highest
                    unit = unit if unit > lowest else lowest
                    these[i] = np.int32(np.floor(unit) if cells else np.rint(unit))
        if bits == 8:
            for i in range(len(body)):
                body[i] = codes[i]
        elif bits == 4:
            for i in range(len(body)):
                body[i] = (codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4
        else:
            for start in range(0, len(body), bits):
                string = 0
                for i in range(8):
                    string |= (codes[start // bits * 8 + i] & mask) << i * bits
                for i in range(min(bits, len(body) - start)):
                    body[start + i] = string >> 8 * i & 0xFF


def _read(
    data: Any, skip: int, bits: int, scales: Any, length: int, group: int, middle: np.float32, rows: Any
) -> np.int8:
    """Returns the lowest of all codes, or -128 if a bit behind the last one is set."""
    sign = 1 << (bits - 1)
    n_codes = rows.shape[1]
    codes = np.zeros(n_codes + 8, np.int8)
    lowest = np.int8(0)
    for layer in range(len(data)):
        body, scale_of, into = data[layer, skip:], scales[layer], rows[layer]
        if bits == 8:
            for i in range(len(body)):
                codes[i] = np.int8(body[i])
        elif bits == 4:
            for i in range(len(body)):
                codes[2 * i] = np.int8((body[i] & 15) ^ 8) - np.int8(8)
                codes[2 * i + 1] = np.int8((body[i] >> 4) ^ 8) - np.int8(8)
        else:
            for start in range(0, len(body), bits):
                string = 0
                for i in range(min(bits, len(body) - start)):
                    string |= np.int64(body[start + i]) << 8 * i
                for i in range(8):
                    codes[start // bits * 8 + i] = (string >> i * bits & 2 * sign - 1 ^ sign) - sign
        for i in range(len(codes)):
            lowest = codes[i] if codes[i] < lowest else lowest
        for i in range(n_codes, len(codes)):
            lowest = lowest if codes[i] == 0 else np.int8(-128)
        g = 0
        for row in range(0, len(into), length):
            for start in range(row, row + length, group):
                stop = min(start + group, row + length)
                piece, these, scale = codes[start:stop], into[start:stop], scale_of[g]
                g += 1
                for i in range(len(piece)):
                    these[i] = (np.float32(piece[i]) + middle) * scale
    return lowest
