"""What a map does to an error of its input, taken apart: sums of paths that end in a linear map."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.align.features import unflatten
from kvferry.kv import Geometry
from kvferry.metrics.lipschitz import sequence_norm, spectral_norm


@dataclass(frozen=True)
class Path:
    """One summand of a map: something of Lipschitz constant `before`, then a linear map to the features `places`."""

    places: Int[Tensor, " some"]
    last: Float[Tensor, "some width"]
    before: float = 1.0

    def to(self, features: Int[Tensor, " few"]) -> Float[Tensor, "found width"]:
        return self.last[torch.isin(self.places, features.to(self.places.device))]


def everywhere(last: Float[Tensor, "out width"], before: float = 1.0) -> Path:
    """A path to all features."""
    return Path(torch.arange(len(last), device=last.device), last, before)


@dataclass(frozen=True)
class TokenMap:
    """Receiver token t as a sum of paths from sender tokens t, t - 1, ..., side by side (`neighbours` of them).

    `kinds`: the paths for each overlap class that a map may treat apart; the worst of them counts.
    """

    neighbours: int
    kinds: tuple[tuple[Path, ...], ...]

    def norm(self, features: Int[Tensor, " some"]) -> float:
        """Lipschitz constant of some features of a receiver token, of the sender tokens side by side."""
        return max(
            sum(path.before * spectral_norm(path.to(features)) for path in kind) for kind in self.kinds
        )

    def sequence_norm(self, features: Int[Tensor, " some"]) -> float | None:
        """Upper bound of the same over whole sequences at once; None for a map that is not one affine map."""
        if len(self.kinds) != 1 or len(self.kinds[0]) != 1:
            return None
        blocks = self.kinds[0][0].to(features).unflatten(-1, (self.neighbours, -1))
        return sequence_norm(blocks.transpose(0, 1))


def receiver_features(
    geometry: Geometry, layer: int
) -> tuple[Int[Tensor, "heads key_dim"], Int[Tensor, "heads value_dim"]]:
    """Which features of a receiver token are the keys and the values of a layer, by head."""
    numbers = torch.arange(geometry.floats_per_token, dtype=torch.float64).view(1, 1, -1)
    group = next(group for group in unflatten(numbers, geometry) if layer in group.layers)
    row = group.layers.index(layer)
    return group.keys[row, 0, :, 0].long(), group.values[row, 0, :, 0].long()
