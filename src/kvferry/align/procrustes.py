"""Rotate and scale: the orthogonal Procrustes map (Schönemann 1966), block by block.

It has nothing to overfit with and keeps angles between tokens. So it is good for two models that hold the same in
other coordinates, and a lower bound otherwise.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from kvferry.align.blocks import Affine, BlockMap, restrict
from kvferry.align.contract import Contract
from kvferry.align.ridge import Sums, standardise


class Procrustes(BlockMap):
    """`receiver = mean + scale * (sender - mean) @ rotation` for each layer, keys off keys and values off values.

    From narrow to wide the rotation has orthonormal rows and is the best there is in squared error. From wide to
    narrow it has orthonormal columns and is the one of largest covariance with the target: the best in squared error
    has no closed form.
    """

    name: ClassVar[str] = "procrustes"

    def __init__(self, contract: Contract, sources: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(contract, sources, reads="same")

    def options(self) -> dict[str, Any]:
        return {"sources": [list(row) for row in self.sources]}

    def solve_from(self, sums: Sums) -> None:
        """Take the map of dense sums. For sums of blocks: `set_blocks` of what `rotate` gives."""
        self.set_blocks([rotate(restrict(sums, block)) for block in self.blocks])


def rotate(sums: Sums) -> Affine:
    """Weight (rotation and scale in one) and bias of one block."""
    std = standardise(sums)
    xx = std.xx * torch.outer(std.x_std, std.x_std)
    xy = std.xy * torch.outer(std.x_std, std.y_std)
    left, _, right = torch.linalg.svd(xy, full_matrices=False)
    rotation = left @ right
    weight = rotation * _scale(rotation, xx, xy)
    return weight, std.y_mean - std.x_mean @ weight


def _scale(
    rotation: Float64[Tensor, "features out"],
    xx: Float64[Tensor, "features features"],
    xy: Float64[Tensor, "features out"],
) -> Float64[Tensor, ""]:
    """The best factor for a given rotation; zero where the sender's features are constant."""
    spread = (rotation * (xx @ rotation)).sum()
    return torch.where(spread > 0, (rotation * xy).sum() / spread, 0.0)
