"""Where the grid of a part comes from: its own statistics, which are sent with it, or a profile that both ends hold."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from kvferry.codec.ecsq.encoder import own_side
from kvferry.codec.ecsq.grid import Grid, profile_level, step_size
from kvferry.codec.ecsq.layout import Part
from kvferry.codec.ecsq.measured import Measured
from kvferry.codec.ecsq.part import PartReader
from kvferry.codec.ecsq.shaping import Feedback, shape
from kvferry.codec.ecsq.side import Side, grid_of
from kvferry.codec.ecsq.source import Arrays, Quantised
from kvferry.codec.ecsq.weights import Weighting, exponents, write_weights
from kvferry.codec.profile import Profile
from kvferry.kv import Geometry
from kvferry.wire import Segment, SegmentType


class Scheme(ABC):
    """The grids of all parts of a frame, at any step."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """What is sent for the frame."""

    @abstractmethod
    def plan(self, measured: Measured, step: int) -> tuple[Side | None, Grid]:
        """What is sent for a part, and the grid that follows from it."""

    @abstractmethod
    def read(self, part: Part, reader: PartReader, step: int) -> Grid:
        """The same grid, from what came."""

    @abstractmethod
    def n_heads(self, part: Part) -> int:
        """Blocks that have a head in the part."""

    def shaped(self, quantised: Quantised, arrays: Arrays) -> Arrays:
        """The numbers to round, of a part."""
        return arrays

    @cached_property
    def feedback(self) -> Feedback:
        """How rounding errors are shaped; empty where they are not."""
        return {}


@dataclass(frozen=True, eq=False)
class SelfContained(Scheme):
    """A mean and a level of each channel are sent, and the weights of the steps."""

    weights: Sequence[int]
    weighting: Weighting

    def segments(self) -> tuple[Segment, ...]:
        return (Segment(SegmentType.WEIGHTS, write_weights(self.weights)),)

    def plan(self, measured: Measured, step: int) -> tuple[Side, Grid]:
        return own_side(measured, self._exponent(measured.part, step))

    def read(self, part: Part, reader: PartReader, step: int) -> Grid:
        return grid_of(reader.side(part.size, part.counts), self._exponent(part, step))

    def n_heads(self, part: Part) -> int:
        return len(part.blocks)

    def _exponent(self, part: Part, step: int) -> Int64[np.ndarray, " channels"]:
        return step + exponents(part.blocks, self.weights, self.weighting)


@dataclass(frozen=True, eq=False)
class FromProfile(Scheme):
    """Nothing is sent: mean, deviation and weight of each channel are those of a profile."""

    profile: Profile
    geometry: Geometry

    def segments(self) -> tuple[Segment, ...]:
        return ()

    def plan(self, measured: Measured, step: int) -> tuple[None, Grid]:
        return None, self._grid(measured.part, step)

    def read(self, part: Part, reader: PartReader, step: int) -> Grid:
        return self._grid(part, step)

    def n_heads(self, part: Part) -> int:
        return 0

    def _grid(self, part: Part, step: int) -> Grid:
        channels = np.concatenate([self.channels[block.layer, block.which] for block in part.blocks])
        exponent = step + self.profile.weight[channels].astype(np.int64)
        level = profile_level(self.profile.deviation[channels].astype(np.int64), exponent)
        return Grid(exponent, step_size(exponent), level, self.profile.mean[channels])

    def shaped(self, quantised: Quantised, arrays: Arrays) -> Arrays:
        return shape(quantised, arrays, self.feedback)

    @cached_property
    def feedback(self) -> Feedback:
        found, at = {}, 0
        for layer, one in enumerate(self.geometry.layers):
            for which, dim in enumerate((one.key_dim, one.value_dim)):
                size = dim * (dim - 1) // 2
                matrices = np.zeros((one.heads, dim, dim), np.float32)
                rows, columns = np.tril_indices(dim, -1)
                matrices[:, rows, columns] = self.profile.shaping[at : at + one.heads * size].reshape(
                    one.heads, size
                )
                found[layer, which] = matrices
                at += one.heads * size
        return found

    @cached_property
    def channels(self) -> dict[tuple[int, int], Int64[np.ndarray, " channels"]]:
        """Where the channels of each layer's keys and values lie in the profile."""
        found, at = {}, 0
        for layer, one in enumerate(self.geometry.layers):
            for which, dim in enumerate((one.key_dim, one.value_dim)):
                found[layer, which] = np.arange(at, at + one.heads * dim)
                at += one.heads * dim
        return found
