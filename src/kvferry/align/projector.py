"""What trained maps share: standardised coordinates inside, the receiver's own scale outside, and a layer map."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.layer_map import Depths, NearestDepth
from kvferry.align.parts import Layers, Parts, parts_of
from kvferry.align.ridge import Standard, Sums, standardise
from kvferry.kv import KV


class Projector(Aligner):
    """`receiver = y_mean + y_std * project((sender - x_mean) / x_std)`, part by part.

    `sources[i]` are the sender's layers that the receiver's layers `targets[i]` are made from, keys from keys and
    values from values; by default each layer is made from the one nearest in depth (`layer_map` has other rules).
    `targets=[[0, 1, ...]]` makes all layers at once. A sender token comes with the `neighbours - 1` tokens before it.

    The published projectors end in a layer normalisation, which gives every token the same length and so takes from
    attention sinks and from values what they are known by. Here the fitted statistics of both models stand around the
    map instead: it learns between numbers of unit variance, and what comes out has the receiver's scale again.
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(
        self,
        contract: Contract,
        sources: Layers | None = None,
        targets: Layers | None = None,
        neighbours: int = 1,
    ) -> None:
        super().__init__(contract)
        sender, receiver = contract.sender, contract.receiver
        if sources is None:
            sources = NearestDepth()(Depths(sender.n_layers, receiver.n_layers))
        if targets is None:
            targets = [[layer] for layer in range(receiver.n_layers)]
        self.sources = [list(layers) for layers in sources]
        self.targets = [list(layers) for layers in targets]
        self.neighbours = neighbours
        self.parts = parts_of(sender, receiver, self.sources, self.targets, neighbours)
        self._columns = nn.ModuleList(_Take(parts.columns) for parts in self.parts)
        self._order = _Take(torch.cat([parts.places.flatten() for parts in self.parts]).argsort())
        for name, width in (("x", neighbours * sender.floats_per_token), ("y", receiver.floats_per_token)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    def options(self) -> dict[str, Any]:
        return {"sources": self.sources, "targets": self.targets, "neighbours": self.neighbours}

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(with_neighbours(kv, self.neighbours)), self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours'."""
        even = (wide - self.x_mean) / self.x_std
        made = self.project([columns(even) for columns in self._columns])
        return self.y_mean + self.y_std * self._order(torch.cat([part.flatten(-2) for part in made], -1))

    @abstractmethod
    def project(self, parts: list[Tensor]) -> list[Tensor]:
        """`[*batch, parts, n_in]` to `[*batch, parts, n_out]` for each of `self.parts`, standardised on both sides."""

    @torch.no_grad()
    def fit_scale(self, sums: Sums) -> Standard:
        """Take means and deviations of both models from the sums of `neighbours` tokens each."""
        std = standardise(sums)
        for name in ("x_mean", "x_std", "y_mean", "y_std"):
            getattr(self, name).copy_(getattr(std, name))
        return std


def correlations(std: Standard, parts: Parts) -> tuple[Tensor, Tensor]:
    """Of the parts' own features, `[parts, n_in, n_in]`, and with what is to come out, `[parts, n_in, n_out]`."""
    columns, places = parts.columns.to(std.xx.device), parts.places.to(std.xx.device)
    across = columns.unsqueeze(-1)
    return std.xx[across, columns.unsqueeze(-2)], std.xy[across, places.unsqueeze(-2)]


class _Take(nn.Module):
    """Picks features by number. Its numbers follow from the contract and are not saved."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, features: Float[Tensor, "*batch features"]) -> Tensor:
        return features[..., self.index]
