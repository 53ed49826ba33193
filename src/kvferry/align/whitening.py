"""The coordinates in which maps between caches are trained: the eigenbasis of a cache's correlations.

Correlations of a cache's channels span eight orders of magnitude, so plain gradient steps crawl along most directions
and overshoot along a few.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

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
