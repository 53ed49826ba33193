"""The coarsest layer of a part, for the shaping of noise: it is that layer's errors that are fed back.

What is refined is then the error that is felt, channel by channel, which is why every layer is as well shaped as the
first: see `rebuild.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int64

from kvferry.codec.ecsq.grid import SILENT
from kvferry.codec.ecsq.source import Quantised
from kvferry.codec.progressive.stages import level_at


@dataclass(frozen=True, eq=False)
class Coarse(Quantised):
    """The rows of a part, some layers up."""

    layer: int

    @cached_property
    def level(self) -> Int64[np.ndarray, " rows"]:
        level = self._finest.level
        return np.where(level == SILENT, SILENT, level_at(level, self.layer))

    @cached_property
    def step(self) -> Float32[np.ndarray, " rows"]:
        return self._finest.step * np.float32(3**self.layer)

    @cached_property
    def _finest(self) -> Quantised:
        return Quantised(self.part, self.grid)
