"""What an encoder knows of a part before it chooses a step: the statistics of all its channels."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from kvferry.codec.ecsq.layout import Block, Part
from kvferry.codec.ecsq.source import Arrays, BlockArray
from kvferry.codec.ecsq.stats import measure
from kvferry.kv import KV, Group


@dataclass(frozen=True, eq=False)
class Reads:
    """The blocks of the tokens `index` of one sequence of a batch, in float32, one at a time."""

    kv: KV
    row: int
    index: Int64[np.ndarray, " tokens"]

    def __call__(self, block: Block) -> BlockArray:
        tensor = self.kv.layer(block.layer)[block.which][self.row].detach()
        if len(self.index) < tensor.shape[1]:
            tensor = tensor[:, torch.from_numpy(self.index).to(tensor.device)]
        return tensor.float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Writes:
    """The blocks of groups of layers on the CPU, float32, one sequence, to be written to."""

    groups: tuple[Group, ...]

    def __call__(self, block: Block) -> BlockArray:
        group = next(group for group in self.groups if block.layer in group.layers)
        tensor = group.values if block.which else group.keys
        return tensor[group.layers.index(block.layer), 0].numpy()


@dataclass(frozen=True, eq=False)
class Measured:
    """One number a channel, or (`power`) a block."""

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
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass through and are reported
        found = [measure(_held(arrays(block), block)) for block in part.blocks]
    return Measured(
        part,
        np.concatenate([np.zeros(0), *(stats.mean for stats in found)]),
        np.concatenate([np.zeros(0), *(stats.deviation for stats in found)]),
        np.concatenate([np.zeros(0, np.float32), *(stats.low for stats in found)]),
        np.concatenate([np.zeros(0, np.float32), *(stats.high for stats in found)]),
        np.array([stats.power for stats in found], np.float64),
    )


def _held(array: BlockArray, block: Block) -> Float32[np.ndarray, "heads held dim"]:
    if block.n_tokens == array.shape[1]:
        return array
    return array[:, np.sort(np.concatenate(list(block.tokens.values())))]
