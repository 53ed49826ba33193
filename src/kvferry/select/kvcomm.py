"""Layers by how much is read from the context, and by their depth."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Need
from kvferry.select.attention import looked
from kvferry.select.layer_contract import LayersByImportance
from kvferry.select.probe import context, probe
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class KVComm(LayersByImportance):
    """Keeps the layers of most attention to the context, beside a Gaussian prior over depth (arXiv:2510.03346).

    Importance is alpha * attention + (1 - alpha) * exp(-(depth - mu)² / 2 sigma²), attention brought to [0, 1] over the
    layers, depth from 0 to 1. KVComm measures the receiver's attention on a sample, here the last `window` queries of
    the sender stand in for a question; its sigma of 10 layers is about 0.35 of the depth of its models; it keeps the
    first slot of every layer and all of layer 0, which a receiver with a head of its own does not need.

    >>> KVComm(alpha=0.7, share=0.3).brief()
    'kvcomm(alpha=0.7, share=0.3)'
    """

    name: ClassVar[str] = "kvcomm"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    alpha: float = 0.5
    mu: float = 0.5
    sigma: float = 0.35
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or self.sigma <= 0 or self.window < 1:
            what = f"kvcomm(alpha={self.alpha}, sigma={self.sigma}, window={self.window})"
            raise BadSpec(what, cure="alpha is in [0, 1], sigma above 0, window 1 or more")

    def importance(self, sight: Sight) -> Float[Tensor, " layers"]:
        masses = [context_mass(sight, layer, self.window) for layer in range(sight.kv.geometry.n_layers)]
        prior = depth_prior(len(masses), self.mu, self.sigma).to(sight.kv.device)
        return self.alpha * _to_unit(torch.stack(masses)) + (1 - self.alpha) * prior


def context_mass(sight: Sight, layer: int, window: int) -> Float[Tensor, ""]:
    """The share of their attention that the last queries give to the context before them, mean over heads."""
    posed = probe(sight, layer, window)
    return looked(posed).weights[..., context(sight, posed)].sum(-1).mean()


def depth_prior(n_layers: int, mu: float, sigma: float) -> Float[Tensor, " layers"]:
    """exp(-(depth - mu)² / 2 sigma²), depth from 0 at the first layer to 1 at the last."""
    depth = torch.arange(n_layers) / max(n_layers - 1, 1)
    return torch.exp(-((depth - mu) ** 2) / (2 * sigma**2))


def _to_unit(numbers: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    low, high = numbers.aminmax()
    return (numbers - low) / (high - low).clamp(min=torch.finfo(numbers.dtype).tiny)
