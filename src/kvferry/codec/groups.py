"""Which numbers of a block share a scale, and the scales themselves."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

Axis = Literal["token", "channel", "head", "block"]
ScaleFormat = Literal["float16", "bfloat16"]

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SCALE_RANGES = {"float16": (2.0**-24, 65504.0), "bfloat16": (2.0**-126, (2 - 2.0**-7) * 2.0**127)}
"""The scales that are written: those outside are clamped, so none is zero, infinite or flushed to zero by a device."""


@dataclass(frozen=True)
class Packing:
    """How a block is packed: which numbers share a scale, the format of scales, and the bits of a code."""

    grouping: "Grouping"
    scale: ScaleFormat
    code_bits: int


@dataclass(frozen=True)
class Grouping:
    """Cuts a block `[heads, tokens, dim]` into rows, and rows into groups of `group` neighbours; 0 is the whole row.

    | axis | one row |
    |---|---|
    | token | the channels of one head and token |
    | channel | the tokens of one head and channel |
    | head | the tokens of one head, `[token, dim]` |
    | block | the whole block, `[head, token, dim]` |

    The last group of a row may be short.

    >>> Grouping("channel", 4).rows(heads=2, tokens=9, dim=3), Grouping("channel", 4).n_groups(2, 9, 3)
    ((6, 9), 18)
    """

    axis: Axis
    group: int

    def rows(self, heads: int, tokens: int, dim: int) -> tuple[int, int]:
        """Number and length of the rows."""
        return {
            "token": (heads * tokens, dim),
            "channel": (heads * dim, tokens),
            "head": (heads, tokens * dim),
            "block": (1, heads * tokens * dim),
        }[self.axis]

    def n_groups(self, heads: int, tokens: int, dim: int) -> int:
        n_rows, length = self.rows(heads, tokens, dim)
        return n_rows * -(-length // (self.group or max(length, 1)))

    def cut(self, block: Float[Tensor, "*batch heads tokens dim"]) -> Float[Tensor, "*batch rows n"]:
        """The rows of a block."""
        turned = block.transpose(-1, -2) if self.axis == "channel" else block
        return turned.reshape(*block.shape[:-3], *self.rows(*block.shape[-3:]))

    def join(
        self, rows: Shaped[Tensor, "*batch rows n"], shape: tuple[int, int, int]
    ) -> Shaped[Tensor, "*batch heads tokens dim"]:
        """The inverse of `cut`, for a block of this shape."""
        heads, tokens, dim = shape
        if self.axis == "channel":
            return rows.reshape(*rows.shape[:-2], heads, dim, tokens).transpose(-1, -2)
        return rows.reshape(*rows.shape[:-2], heads, tokens, dim)

    def split(self, rows: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows groups group"]:
        """The groups of each row, the last one filled with zeros."""
        length = rows.shape[-1]
        group = max(1, min(self.group or length, length))
        n_groups = -(-length // group)
        return torch.nn.functional.pad(rows, (0, n_groups * group - length)).unflatten(-1, (n_groups, group))

    def together(
        self,
        values: Float[Tensor, "layers batch heads tokens dim"],
        present: Bool[Tensor, "layers batch tokens"],
    ) -> tuple[Float[Tensor, "layers batch some slots dim"], Int64[Tensor, "layers batch slots"]]:
        """The present slots moved to the front, where groups cross slots, so that absent ones take part in none.

        Beside them the order they were taken in, for `apart`. With `axis=block` all heads become one.
        """
        mask = present
        if self.axis == "block":
            mask = present.unsqueeze(2).expand(values.shape[:4]).flatten(2)
            values = values.flatten(2, 3).unsqueeze(2)
        order = torch.argsort(mask.logical_not().byte(), dim=-1, stable=True)
        return _reorder(values, order), order

    def apart(
        self,
        values: Float[Tensor, "layers batch some slots dim"],
        order: Int64[Tensor, "layers batch slots"],
        heads: int,
    ) -> Float[Tensor, "layers batch heads tokens dim"]:
        """The inverse of `together`."""
        back = _reorder(values, order.argsort(dim=-1))
        return back.squeeze(2).unflatten(2, (heads, -1)) if self.axis == "block" else back


def scales_of(peaks: Float[Tensor, "*groups"], top: float, scale: ScaleFormat) -> Shaped[Tensor, "*groups"]:
    """`peak / top` in the format of scales, clamped to its range. `top` is what the largest of a group becomes."""
    # A tensor, not a number: some devices multiply by the reciprocal of a number, which rounds differently.
    ratio = peaks / peaks.new_full((), top)
    return ratio.clamp(SCALE_RANGES[scale][0], highest_scale(top, scale)).to(SCALE_DTYPES[scale])


@cache
def highest_scale(top: float, scale: ScaleFormat) -> float:
    """The largest scale of a format with which `top` is finite in float32.

    >>> highest_scale(127.0, "float16"), 127.0 * highest_scale(127.0, "bfloat16") < 2.0**128
    (65504.0, True)
    """
    bound = min(SCALE_RANGES[scale][1], torch.finfo(torch.float32).max / top)
    nearest = torch.tensor(bound, dtype=torch.float64).to(SCALE_DTYPES[scale])
    below = (nearest.view(torch.int16) - 1).view(SCALE_DTYPES[scale])
    return float(nearest if float(nearest) <= bound else below)


def _reorder(
    values: Float[Tensor, "layers batch heads slots dim"], order: Int64[Tensor, "layers batch slots"]
) -> Float[Tensor, "layers batch heads slots dim"]:
    return values.gather(3, order[:, :, None, :, None].expand_as(values))
