"""The coordinates in which maps between caches are trained: the eigenbasis of a cache's correlations.

Correlations of a cache's channels span eight orders of magnitude, so plain gradient steps crawl along most directions
and overshoot along a few.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from kvferry.align.contract import Aligner
from kvferry.align.ridge import Standard

EPSILON = 1e-3
"""Added to eigenvalues of the correlation matrix: directions below it are noise of the codec."""


def whitening(
    std: Standard,
) -> tuple[Float64[Tensor, "features features"], Float64[Tensor, "features features"]]:
    """`basis` with `(x - x_mean) @ basis` of unit variance in every direction above the noise, and its inverse."""
    values, vectors = torch.linalg.eigh(std.xx)
    scale = (values.clamp(min=0) + EPSILON).rsqrt()
    return vectors * scale / std.x_std.unsqueeze(-1), (vectors / scale).T * std.x_std


class Whitened(Aligner):
    """An aligner that is trained from `(sender - x_mean) @ basis` to `(receiver - y_mean) / y_std`."""

    basis: Tensor
    x_mean: Tensor
    y_mean: Tensor
    y_std: Tensor

    def lay_out(self, n_in: int, n_seen: int, n_out: int) -> None:
        """Room for the coordinates, `n_seen` of the sender's; a folded map has none."""
        self.register_buffer("basis", torch.eye(n_in, n_seen))
        self.register_buffer("x_mean", torch.zeros(n_in))
        self.register_buffer("y_mean", torch.zeros(n_out))
        self.register_buffer("y_std", torch.ones(n_out))

    @torch.no_grad()
    def whiten(self, std: Standard) -> Float64[Tensor, "features features"]:
        """Take the coordinates of what was seen; the inverse of the basis."""
        basis, back = whitening(std)
        self.basis.copy_(basis)
        self.x_mean.copy_(std.x_mean)
        self.y_mean.copy_(std.y_mean)
        self.y_std.copy_(std.y_std)
        return back
