"""Layers of a network for many parts at once: one weight per part, stacked, so that no Python loop runs over them.

In all of them `parts` counts layers of the receiver, keys and values apart.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """A `ModuleList` that says what it holds."""

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())


class StackedLinear(nn.Module):
    """`x @ weight + bias`, part by part."""

    def __init__(self, n_parts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = max(n_in, 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(n_parts, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n_parts, n_out))

    def forward(self, x: Float[Tensor, "*batch parts features"]) -> Float[Tensor, "*batch parts out"]:
        return torch.einsum("...pi,pio->...po", x, self.weight) + self.bias


class StackedNorm(nn.Module):
    """Layer normalisation with a gain and a shift of its own for each part."""

    def __init__(self, n_parts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_parts, width))
        self.bias = nn.Parameter(torch.zeros(n_parts, width))

    def forward(self, x: Float[Tensor, "*batch parts features"]) -> Float[Tensor, "*batch parts features"]:
        return functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias
