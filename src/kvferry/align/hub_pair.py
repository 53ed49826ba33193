"""A map by way of a shared space: what a model's cache says as a code, and a model's cache from a code."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract, require_positive
from kvferry.align.features import as_receiver
from kvferry.align.runs import in_runs
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
    """`mean + std * (code @ weight[place] + bias[place])`."""

    mean: Tensor
    std: Tensor

    def __init__(self, n_features: int, dim: int, places: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.weight = nn.Parameter(torch.randn(places, dim, n_features) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(places, n_features))

    def forward(
        self, code: Float[Tensor, "*batch code"], place: Int[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Without `place` all tokens are of the first one."""
        if place is None:
            return self.mean + self.std * (code @ self.weight[0] + self.bias[0])
        made = self.bias[place]
        for index, weight in enumerate(self.weight):
            # Every place sees every token: no device is waited for.
            made = made + code * (place == index).unsqueeze(-1) @ weight
        return self.mean + self.std * made


class HubPair(Aligner):
    """The sender's encoder, the receiver's decoder. With one model as both it is that model's membership in a hub.

    A code is of a token with the `neighbours - 1` before it; `places` tell the receiver's tokens apart that share a
    token of the sender's (`align.runs`), the letters of a receiver of bytes.
    """

    name: ClassVar[str] = "hub_pair"

    def __init__(self, contract: Contract, dim: int = 256, neighbours: int = 1, places: int = 1) -> None:
        super().__init__(contract)
        self.dim, self.neighbours, self.places = dim, neighbours, places
        for name in ("dim", "neighbours", "places"):
            require_positive(name, getattr(self, name))
        self.encoder = Encoder(neighbours * contract.sender.floats_per_token, dim)
        self.decoder = Decoder(contract.receiver.floats_per_token, dim, places)

    def options(self) -> dict[str, Any]:
        return {"dim": self.dim, "neighbours": self.neighbours, "places": self.places}

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        wide, place = in_runs(kv, self.neighbours, self.places)
        features = self.map(wide) if self.places == 1 else self.decoder(self.encoder(wide), place)
        return as_receiver(kv, features, self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours', all at the first place."""
        return self.decoder(self.encoder(wide))
