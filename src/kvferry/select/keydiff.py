"""Slots whose keys are unlike the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class KeyDiff(TokenSelector):
    """Keeps the slots whose keys point away from the mean unit key (Park et al., KeyDiff, arXiv:2504.15364).

    Here keys are compared in content space, before rotation: a slot is not unlike the others for where it stands.

    >>> KeyDiff(proportion=0.5).brief()
    'keydiff(proportion=0.5)'
    """

    name: ClassVar[str] = "keydiff"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        kv = sight.kv
        return torch.stack(
            [
                _unlikeness(kv.layer(layer)[0][0].float(), kv.present[layer, 0])
                for layer in range(kv.geometry.n_layers)
            ]
        )


def _unlikeness(
    keys: Float[Tensor, "heads slots dim"], held: Bool[Tensor, " slots"]
) -> Float[Tensor, " slots"]:
    """Minus the cosine to the mean unit key of the slots held, mean over heads."""
    units = normalize(keys.masked_fill(~held.unsqueeze(-1), 0.0), dim=-1)
    centre = units.sum(1, keepdim=True) / held.sum().clamp(min=1)
    return -cosine_similarity(units, centre, dim=-1).mean(0)
