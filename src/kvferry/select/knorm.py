"""Slots by the length of their keys."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Knorm(TokenSelector):
    """Keeps the slots whose keys are short (Devoto et al., arXiv:2406.11430); the mean over heads counts.

    In pretrained models short keys, not long ones, are those that attention likes to read. Small models trained on
    recall can have it the other way round: `keep=high` is the opposite sign.

    >>> Knorm(keep="high").brief()
    'knorm(keep=high)'
    """

    name: ClassVar[str] = "knorm"
    keep: Literal["low", "high"] = "low"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        keys = (sight.kv.layer(layer)[0] for layer in range(sight.kv.geometry.n_layers))
        norms = torch.stack([one[0].float().norm(dim=-1).mean(0) for one in keys])
        return norms if self.keep == "high" else -norms
