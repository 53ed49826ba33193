"""One affine map from a token's sender entry (all layers, K and V) to its receiver entry.

Cross-model ridge maps per head and layer: arXiv:2608.03893. Here one matrix sees all layers at once, on keys without
rotation, and may be trained further on the receiver's answers (`kvferry.train`).
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract, require_positive
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.kv import KV


class Linear(Aligner):
    """`receiver = sender @ weight + bias`, where a sender token comes with the `neighbours - 1` tokens before it.

    Solved in closed form by `ridge.solve`, or started there and trained. Neighbours help where the receiver's layers
    look back further than the sender's; one is the plain map, token by token.
    """

    name: ClassVar[str] = "linear"

    def __init__(self, contract: Contract, neighbours: int = 1) -> None:
        super().__init__(contract)
        require_positive("neighbours", neighbours)
        self.neighbours = neighbours
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def options(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def forward(self, kv: KV) -> KV:
        return affine(kv, self.weight, self.bias, self.contract)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours'."""
        return torch.nn.functional.linear(wide, self.weight.T, self.bias)


def affine(
    kv: KV, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"], contract: Contract
) -> KV:
    """Apply an affine map to a content-space cache."""
    kv.require_space("content")
    n_neighbours = len(weight) // contract.sender.floats_per_token
    mapped = torch.nn.functional.linear(with_neighbours(kv, n_neighbours), weight.T, bias)
    return as_receiver(kv, mapped, contract.receiver)
