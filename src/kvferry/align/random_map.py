"""A random map, as a control: what a map of the right shape and size is worth that knows nothing."""

from typing import Any, ClassVar

import torch

from kvferry.align.blocks import BlockMap
from kvferry.align.contract import Contract, Unfitted


class RandomMap(BlockMap, Unfitted):
    """Normal weights of a seed, layer by layer, keys off keys and values off values, from the layer nearest in depth.

    Weights are divided by the root of their number, so that a mapped token is about as long as it was. Nothing is
    matched to the receiver but its shape. Worse than nothing at all on some receivers, so no control to beat alone.
    """

    name: ClassVar[str] = "random_map"

    def __init__(self, contract: Contract, seed: int = 0) -> None:
        super().__init__(contract, reads="same")
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        shapes = [(len(block.inputs), len(block.outputs)) for block in self.blocks]
        self.set_blocks(
            [
                (torch.randn(shape, generator=generator) / shape[0] ** 0.5, torch.zeros(shape[1]))
                for shape in shapes
            ]
        )

    def options(self) -> dict[str, Any]:
        return {"seed": self.seed}
