"""What an encoder knows of a part before it chooses a step: the statistics of all its channels."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.ecsq.source import Arrays, BlockArray
from kvferry.codec.ecsq.stats import measure
from kvferry.kv import KV, Group


@dataclass(frozen=True, eq=False)
class Reads:
    """The blocks of the tokens `index` of a single sequence, in float32, one at a time."""

    kv: KV
    index: Int64[np.ndarray, " tokens"]

    def __call__(self, block: Block) -> BlockArray:
        tensor = self._tensors[block.layer, block.which]
        if len(self.index) < tensor.shape[1]:
            tensor = tensor[:, torch.from_numpy(self.index).to(tensor.device)]
        return tensor.float().cpu().numpy()

    @cached_property
    def _tensors(self) -> dict[tuple[int, int], Float[Tensor, "_heads all_tokens _dim"]]:
        return {
            (layer, which): tensor
            for group in self.kv.groups
            for which, tensors in enumerate((group.keys, group.values))
            for layer, tensor in zip(group.layers, tensors.detach()[:, 0], strict=True)
        }


@dataclass(frozen=True, eq=False)
class Writes:
    """The blocks of groups of layers on the CPU, float32, one sequence, to be written to."""

    groups: tuple[Group, ...]

    def __call__(self, block: Block) -> BlockArray:
        return self._arrays[block.layer, block.which]

    @cached_property
    def _arrays(self) -> dict[tuple[int, int], BlockArray]:
        return {
            (layer, which): array
            for group in self.groups
            for which, tensor in enumerate((group.keys, group.values))
            for layer, array in zip(group.layers, tensor[:, 0].numpy(), strict=True)
        }


@dataclass(frozen=True, eq=False)
class Measured:
    """One number a channel, or (`power`) a block.

    `power` is what a step is measured by: mean square about the channel means, each mean counted as one more token.
    """

    part: Part
    mean: Float64[np.ndarray, " channels"]
    deviation: Float64[np.ndarray, " channels"]
    low: Float32[np.ndarray, " channels"]
    high: Float32[np.ndarray, " channels"]
    power: Float64[np.ndarray, " blocks"]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())


def measure_part(part: Part, arrays: Arrays) -> Measured:
    """Measure every block, tokens that its layer does not hold aside."""
    if not part.blocks:
        none, none32 = np.zeros(0), np.zeros(0, np.float32)
        return Measured(part, none, none, none32, none32, none)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass through and are reported
        stats = measure([_held(arrays(block), block) for block in part.blocks])
        square = part.n_tokens * stats.deviation**2 + stats.mean**2
        first = np.cumsum(part.size) - part.size
        power = np.add.reduceat(square / (part.n_tokens + 1), first) / part.size
    return Measured(part, stats.mean, stats.deviation, stats.low, stats.high, power)


def _held(array: BlockArray, block: Block) -> Float32[np.ndarray, "heads held dim"]:
    if block.n_tokens == array.shape[1]:
        return array
    return array[:, np.sort(np.concatenate(list(block.tokens.values())))]
