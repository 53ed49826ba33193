"""One affine map from a token's sender entry (all layers, K and V) to its receiver entry.

Cross-model ridge maps per head and layer: arXiv:2608.03893. Here one matrix sees all layers at once, on keys without
rotation, and may be trained further on the receiver's answers (`kvferry.train`).
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import flatten, unflatten
from kvferry.kv import KV


class Linear(Aligner):
    """`receiver = sender @ weight + bias`, token by token.

    Solved in closed form by `ridge.solve`, or started there and trained.
    """

    name: ClassVar[str] = "linear"

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract)
        n_in, n_out = contract.sender.floats_per_token, contract.receiver.floats_per_token
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, kv: KV) -> KV:
        return affine(kv, self.weight, self.bias, self.contract)


def affine(
    kv: KV, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"], contract: Contract
) -> KV:
    """Apply an affine map to a content-space cache. A token that some sender layer lacks is lost for every layer."""
    kv.require_space("content")
    mapped = torch.nn.functional.linear(flatten(kv), weight.T, bias)
    present = kv.present.all(0).expand(contract.receiver.n_layers, -1, -1)
    groups = unflatten(mapped, contract.receiver)
    return replace(kv, geometry=contract.receiver, groups=groups, present=present)
