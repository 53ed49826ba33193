"""The last slots: what stands nearest to the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Back(TokenSelector):
    """Keeps the end of the text. Strong where questions come last and ask about what came just before.

    >>> Back(proportion=0.25)
    back(scope=all_context, proportion=0.25, min_tokens=1, sinks=0, per_layer=False)
    """

    name: ClassVar[str] = "back"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        slots = torch.arange(sight.kv.n_tokens, device=sight.kv.device, dtype=torch.float32)
        return slots.expand(sight.kv.geometry.n_layers, -1)
