"""Coordinates in which an affine map is easy to train.

Plain gradient steps on a map between caches are ill-conditioned: correlations of a cache's channels span eight orders
of magnitude. Here the input is whitened and the output standardised; the map itself is the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.ridge import Sums, standardise

EPSILON = 1e-3
"""Added to eigenvalues of the correlation matrix: directions below it are noise of the codec."""


class Whitened(nn.Module):
    """Trains `inner` and `shift` of

    weight = basis @ inner * y_std
    bias = y_mean + shift * y_std - x_mean @ weight
    """

    basis: Tensor
    x_mean: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(
        self, sums: Sums, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"]
    ) -> None:
        super().__init__()
        std = standardise(sums)
        values, vectors = torch.linalg.eigh(std.xx)
        scale = (values.clamp(min=0) + EPSILON).rsqrt()
        basis = vectors * scale / std.x_std.unsqueeze(-1)
        inverse = (vectors / scale).T * std.x_std
        for name, value in (
            ("basis", basis),
            ("x_mean", std.x_mean),
            ("y_mean", std.y_mean),
            ("y_std", std.y_std),
        ):
            self.register_buffer(name, value.float())
        start = bias.double() + std.x_mean @ weight.double() - std.y_mean
        self.inner = nn.Parameter((inverse @ weight.double() / std.y_std).float())
        self.shift = nn.Parameter((start / std.y_std).float())

    def forward(self) -> tuple[Float[Tensor, "features out"], Float[Tensor, " out"]]:
        """Weight and bias in the caches' own coordinates."""
        weight = self.basis @ self.inner * self.y_std
        return weight, self.y_mean + self.shift * self.y_std - self.x_mean @ weight
