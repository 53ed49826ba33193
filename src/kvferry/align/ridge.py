"""Closed-form ridge regression from streamed sums: memory does not grow with the number of texts.

Sums of several codecs are added up, so the map sees the caches as the wire delivers them. A map fitted on clean caches
alone is ill-conditioned and amplifies quantisation noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kvferry.errors import UsageError


@dataclass
class Sums:
    """Sufficient statistics of pairs (x, y), fp64. Add with `+`: order and partition do not matter."""

    n: float
    x: Float64[Tensor, " features"]
    y: Float64[Tensor, " out"]
    xx: Float64[Tensor, "features features"]
    xy: Float64[Tensor, "features out"]
    yy: Float64[Tensor, " out"]

    @classmethod
    def of(cls, x: Float[Tensor, "tokens features"], y: Float[Tensor, "tokens out"]) -> "Sums":
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum(0))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )


@dataclass(frozen=True)
class Standard:
    """Means, deviations and correlations of both sides."""

    x_mean: Float64[Tensor, " features"]
    x_std: Float64[Tensor, " features"]
    y_mean: Float64[Tensor, " out"]
    y_std: Float64[Tensor, " out"]
    xx: Float64[Tensor, "features features"]
    xy: Float64[Tensor, "features out"]


def standardise(sums: Sums) -> Standard:
    """Correlations from sums. Constant channels get deviation one, so that nothing divides by zero."""
    if sums.n < 2:
        raise UsageError(
            f"{sums.n} token pairs", cure="Fit on texts that both models can read, of several tokens each"
        )
    x_mean, y_mean = sums.x / sums.n, sums.y / sums.n
    xx = sums.xx / sums.n - torch.outer(x_mean, x_mean)
    xy = sums.xy / sums.n - torch.outer(x_mean, y_mean)
    x_std, y_std = _deviation(xx.diagonal()), _deviation(sums.yy / sums.n - y_mean**2)
    return Standard(
        x_mean, x_std, y_mean, y_std, xx / torch.outer(x_std, x_std), xy / torch.outer(x_std, y_std)
    )


def solve(sums: Sums, penalty: float) -> tuple[Float[Tensor, "features out"], Float[Tensor, " out"]]:
    """Weight and bias of the ridge map; `penalty` is relative to the variance of a standardised feature."""
    std = standardise(sums)
    eye = torch.eye(len(std.xx), dtype=torch.float64, device=std.xx.device)
    standard_weight = torch.linalg.solve(std.xx + penalty * eye, std.xy)
    weight = standard_weight * std.y_std / std.x_std.unsqueeze(-1)
    return weight.float(), (std.y_mean - std.x_mean @ weight).float()


def _deviation(variance: Float64[Tensor, " channels"]) -> Float64[Tensor, " channels"]:
    return torch.where(variance > 1e-12, variance, 1.0).sqrt()
