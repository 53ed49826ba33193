"""Ridge regression block by block: each layer or head of the receiver from a few layers or heads of the sender.

Cross-model ridge maps for each head, from the best eight source layers: arXiv:2608.03893, which needs equal heads and
tokenizers; here both may differ, and keys have no rotation. A block has far fewer weights than the dense map
(`linear`), so it needs fewer texts, and models of many layers fit in memory.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from kvferry.align.blocks import Affine, Block, BlockMap, layer_features, restrict
from kvferry.align.ridge import Sums, solve, standardise
from kvferry.kv import Geometry


class Blockwise(BlockMap):
    """`receiver = sender @ weight + bias`, each block on its own.

    With `heads="all"` every head reads whole layers. Ridge maps to different outputs do not depend on each other, so
    maps for each head then are the map of the layer; a rule for heads (`ratio`, `nearest_depth`) makes them smaller.
    """

    name: ClassVar[str] = "blockwise"

    def solve_from(self, sums: Sums, penalty: float) -> None:
        """Take the ridge map of dense sums of `neighbours` tokens each. For sums of blocks: `set_blocks`."""
        self.set_blocks(solve_blocks(sums, self.blocks, penalty))


def solve_blocks(sums: Sums, blocks: Sequence[Block], penalty: float) -> list[Affine]:
    """Weight and bias of each block; `penalty` as in `ridge.solve`."""
    return [solve(restrict(sums, block), penalty) for block in blocks]


def layer_errors(
    train: Sums, held_out: Sums, sender: Geometry, receiver: Geometry, penalty: float
) -> Float64[Tensor, "receiver sender"]:
    """What `top_k_sources` chooses by: the error of each receiver layer, read off each sender layer alone.

    Fitted on `train`, measured on `held_out`, as a share of the variance, mean over channels: 1 is no better than the
    mean. For caches that were coded, both sums must be of coded ones.
    """
    everything = torch.arange(receiver.floats_per_token)
    n_neighbours = len(train.x) // sender.floats_per_token
    held = [layer_features(receiver, layer) for layer in range(receiver.n_layers)]
    columns = []
    for layer in range(sender.n_layers):
        block = Block(layer_features(sender, layer, n_neighbours), everything)
        left = unexplained(restrict(held_out, block), solve(restrict(train, block), penalty))
        columns.append(torch.stack([left[some].mean() for some in held]))
    return torch.stack(columns, 1)


def unexplained(sums: Sums, affine: Affine) -> Float64[Tensor, " out"]:
    """Squared error of a map on the pairs behind `sums`, as a share of each output's variance."""
    std, (weight, bias) = standardise(sums), affine
    scaled = weight.double() * std.x_std[:, None] / std.y_std
    shift = (std.x_mean @ weight.double() + bias - std.y_mean) / std.y_std
    variance = (sums.yy / sums.n - std.y_mean**2) / std.y_std**2
    return variance - 2 * (scaled * std.xy).sum(0) + (scaled * (std.xx @ scaled)).sum(0) + shift**2
