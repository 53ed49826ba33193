"""Reduced-rank ridge regression in closed form (Izenman 1975; with a penalty: Mukherjee and Zhu 2011).

The best map of all that go through `rank` numbers per token, kept as two factors: a fraction of the dense map's size,
and less to overfit with.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.ridge import Sums, standardise
from kvferry.errors import UsageError
from kvferry.kv import KV


class LowRank(Aligner):
    """`receiver = sender @ down @ up + bias`, all layers of the sender to all of the receiver, with neighbours."""

    name: ClassVar[str] = "low_rank"

    def __init__(self, contract: Contract, rank: int = 64, neighbours: int = 1) -> None:
        super().__init__(contract)
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        if not 1 <= rank <= min(n_in, n_out):
            cure = f"Give a rank of 1 to {min(n_in, n_out)}"
            raise UsageError(f"rank {rank} of a map from {n_in} to {n_out} numbers", cure=cure)
        self.rank, self.neighbours = rank, neighbours
        self.down = nn.Parameter(torch.zeros(n_in, rank))
        self.up = nn.Parameter(torch.zeros(rank, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "neighbours": self.neighbours}

    @torch.no_grad()
    def solve_from(self, sums: Sums, penalty: float) -> None:
        """Take the map of sums of `neighbours` tokens each."""
        for own, solved in zip(
            (self.down, self.up, self.bias), solve_low_rank(sums, self.rank, penalty), strict=True
        ):
            own.copy_(solved)

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(with_neighbours(kv, self.neighbours)), self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours'."""
        return wide @ self.down @ self.up + self.bias


def solve_low_rank(
    sums: Sums, rank: int, penalty: float
) -> tuple[Float64[Tensor, "features rank"], Float64[Tensor, "rank out"], Float64[Tensor, " out"]]:
    """The two factors and the bias of least squared error over the receiver's standardised channels, plus `penalty`
    (as in `ridge.solve`) times the squared weights. With full rank, their product is the ridge map.

    With whitened features a map's squared error is its distance to the ridge map, up to a constant; so the best map of
    lower rank is the ridge map's truncated singular value decomposition there. The penalty takes part in whitening.
    """
    if not penalty > 0:
        raise UsageError(
            f"penalty {penalty}", cure="Give a positive one: without it, features cannot be whitened"
        )
    std = standardise(sums)
    root = torch.linalg.cholesky(std.xx + penalty * torch.eye(len(std.xx)).to(std.xx))
    left, values, right = torch.linalg.svd(
        torch.linalg.solve_triangular(root, std.xy, upper=False), full_matrices=False
    )
    narrow = left[:, :rank] * values[:rank].sqrt()
    down = torch.linalg.solve_triangular(root.T, narrow, upper=True) / std.x_std[:, None]
    up = values[:rank].sqrt()[:, None] * right[:rank] * std.y_std
    return down, up, std.y_mean - std.x_mean @ down @ up
