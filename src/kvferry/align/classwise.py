"""One affine map for each overlap class of a token on the receiver's grid.

A receiver's token that was pooled from one sender token is another thing than one pooled from four: on pairs of
different tokenizers a map for each class closes more of the gap than any single one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract, require_positive
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.receiver_grid import N_CLASSES, classes_of
from kvferry.align.ridge import Sums, solve
from kvferry.kv import KV

SHARED = 0.02
"""Weight of the tokens of all classes beside those of a class: so little is known of a rare one alone."""


class Classwise(Aligner):
    """`receiver = sender @ weight[class] + bias[class]`, a sender token with the `neighbours - 1` tokens before it."""

    name: ClassVar[str] = "classwise"

    def __init__(self, contract: Contract, neighbours: int = 1) -> None:
        super().__init__(contract)
        require_positive("neighbours", neighbours)
        self.neighbours = neighbours
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        self.weight = nn.Parameter(torch.zeros(N_CLASSES, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(N_CLASSES, n_out))

    def options(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def forward(self, kv: KV) -> KV:
        """Raises `GridMismatch` for a cache on the sender's own grid."""
        kv.require_space("content")
        mapped = by_class(with_neighbours(kv, self.neighbours), classes_of(kv), self.weight, self.bias)
        return as_receiver(kv, mapped, self.contract.receiver)

    @torch.no_grad()
    def solve_from(self, sums: Sequence[Sums], penalty: float) -> None:
        """Take the ridge map of each class from its sums over `neighbours` tokens each."""
        total = sum(sums[1:], sums[0])
        for index, own in enumerate(sums):
            weight, bias = solve(own + scaled(total, SHARED), penalty)
            self.weight[index].copy_(weight)
            self.bias[index].copy_(bias)


def by_class(
    wide: Float[Tensor, "batch tokens features"],
    classes: Int[Tensor, "batch tokens"],
    weight: Float[Tensor, "classes features out"],
    bias: Float[Tensor, "classes out"],
) -> Float[Tensor, "batch tokens out"]:
    """Each token through the map of its class. Every map sees every token: no device is waited for."""
    mapped = bias[classes]
    for index in range(len(weight)):
        mapped = mapped + (wide * (classes == index).unsqueeze(-1)) @ weight[index]
    return mapped


def scaled(sums: Sums, share: float) -> Sums:
    """Sums as if there were `share` times as many tokens."""
    parts = {name: share * getattr(sums, name) for name in ("x", "y", "xx", "xy", "yy")}
    return replace(sums, n=share * sums.n, **parts)
