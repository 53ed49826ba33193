"""A map by way of a shared space: what a model's cache says as a code, and a model's cache from a code."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.kv import KV


class Encoder(nn.Module):
    """`((features - mean) / std) @ weight + bias`."""

    mean: Tensor
    std: Tensor

    def __init__(self, n_features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.weight = nn.Parameter(torch.randn(n_features, dim) * n_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch code"]:
        return (features - self.mean) / self.std @ self.weight + self.bias


class Decoder(nn.Module):
    """`mean + std * (code @ weight + bias)`."""

    mean: Tensor
    std: Tensor

    def __init__(self, n_features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.weight = nn.Parameter(torch.randn(dim, n_features) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, code: Float[Tensor, "*batch code"]) -> Float[Tensor, "*batch features"]:
        return self.mean + self.std * (code @ self.weight + self.bias)


class HubPair(Aligner):
    """The sender's encoder, the receiver's decoder. With one model as both it is that model's membership in a hub."""

    name: ClassVar[str] = "hub_pair"
    neighbours = 1

    def __init__(self, contract: Contract, dim: int = 256) -> None:
        super().__init__(contract)
        self.dim = dim
        self.encoder = Encoder(contract.sender.floats_per_token, dim)
        self.decoder = Decoder(contract.receiver.floats_per_token, dim)

    def options(self) -> dict[str, Any]:
        return {"dim": self.dim}

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(with_neighbours(kv, 1)), self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features."""
        return self.decoder(self.encoder(wide))
