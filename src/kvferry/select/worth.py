"""What an error in each slot's keys and values is worth to whoever reads on, told from the cache alone.

Fitted by what it is for: steps of so many octaves, noise of such steps, and the receiver's answers behind it
(`kvferry.train.worth_fit`). It is a small function of the slot's own entry and of its place. How layers, K and V weigh
against one another is left to the codec's own measure: its profile is fitted for that.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import ForeignModel
from kvferry.kv import KV, Geometry

_N_PLACES = 4
"""Numbers that say where a slot stands."""
_HIDDEN = 32


@dataclass(frozen=True)
class WorthSettings:
    """What a worth was fitted for: the sender, and, in words, its receiver and the codec."""

    model: str
    geometry: str
    tokenizer: str
    grid: str
    receiver: str
    codec: str

    def require(self, kv: KV) -> None:
        """Raise `ForeignModel` for a cache of another sender."""
        own = (kv.geometry.model, kv.geometry.shape_digest(), kv.geometry.tokenizer)
        if own != (self.model, self.geometry, self.tokenizer):
            cure = "Fit one for this sender (kvferry fit-worth), or use lagrangian without one"
            raise ForeignModel(
                f"this worth was fitted for model {self.model[:16]}, not {own[0][:16]}", cure=cure
            )


class Worth(nn.Module):
    """Octaves by which the steps of each slot are coarser than those of others."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
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
        standard = (_entries(kv) - self.mean) / self.deviation
        features = torch.cat([standard, _places(kv)], -1)
        return self.outer(nn.functional.gelu(self.inner(features))).squeeze(-1)


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
