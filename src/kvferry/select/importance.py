"""How much an error in a slot counts for whoever reads on, told from the cache alone.

Fitted by what it is for: steps of so many octaves, noise of such steps, and the receiver's answers behind it
(`kvferry.train.importance_fit`). It is a small function of the slot's own entry and of its place. How layers, K and V
weigh against one another is left to the codec's own measure: its profile is fitted for that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import ForeignModel
from kvferry.kv import KV, Geometry
from kvferry.select.bound_folder import BoundFolder

_N_PLACES = 4
"""Numbers that say where a slot stands."""
_HIDDEN = 32


class Importance(nn.Module):
    """Octaves by which the steps of each slot are coarser than those of others, for slots on one token grid.

    Kept as a folder, see `IMPORTANCES`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, geometry: Geometry, grid: str = "sender") -> None:
        super().__init__()
        self.grid = grid
        n_features = geometry.floats_per_token
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("deviation", torch.ones(n_features))
        self.inner = nn.Linear(n_features + _N_PLACES, _HIDDEN)
        self.outer = nn.Linear(_HIDDEN, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    @torch.no_grad()
    def standardise(self, kv: KV) -> None:
        """Take mean and deviation of each number of an entry from these caches."""
        entries = _entries(kv)[kv.present.any(0)]
        self.mean.copy_(entries.mean(0))
        self.deviation.copy_(entries.std(0).clamp(min=1e-6))

    def forward(self, kv: KV) -> Float[Tensor, "batch tokens"]:
        """Octaves of each slot; `ForeignModel` for slots on another grid than the one that it was fitted on."""
        if (own := _grid_of(kv)) != self.grid:
            cure = "Fit one behind the aligner that is used: kvferry fit-importance --aligner DIR"
            raise ForeignModel(
                f"importance was fitted on the {self.grid}'s tokens, not the {own}'s", cure=cure
            )
        standard = (_entries(kv) - self.mean) / self.deviation
        features = torch.cat([standard, _places(kv)], -1)
        return self.outer(nn.functional.gelu(self.inner(features))).squeeze(-1)


def _grid_of(kv: KV) -> str:
    return "sender" if kv.spans[0].overlap is None else "receiver"


def _entries(kv: KV) -> Float[Tensor, "batch tokens features"]:
    """All that a slot holds, side by side."""
    parts = [part for group in kv.groups for part in (group.keys, group.values)]
    return torch.cat([part.float().permute(1, 3, 0, 2, 4).flatten(2) for part in parts], -1)


def _places(kv: KV) -> Float[Tensor, "batch tokens places"]:
    """How far a slot is from the start and from the end, on two scales."""
    held = kv.present.any(0)
    position = kv.positions[0].float()
    last = position.masked_fill(~held, 0.0).amax(-1, keepdim=True)
    behind, before = (x.clamp(min=0.0) for x in (position, last - position))
    scales = [x for distance in (behind, before) for x in (distance.log1p(), 8 / (1 + distance))]
    return torch.stack(scales, -1)


def _built(geometry: Geometry, config: Mapping[str, Any]) -> Importance:
    return Importance(geometry, config["grid"])


IMPORTANCES = BoundFolder("importance", _built, "kvferry fit-importance")
