"""The control without content: every token becomes the receiver's mean entry."""

from typing import ClassVar

import torch
from torch import Tensor

from kvferry.align.contract import Contract, Unfitted
from kvferry.align.features import as_receiver
from kvferry.align.ridge import Sums
from kvferry.kv import KV


class MeanOnly(Unfitted):
    """Says how many slots there are and nothing of what is in them.

    It alone closes 30 to 57 % of the gap between no prefix and the whole text, since a receiver expects to be in the
    middle of something. What a map is worth begins here. What it fits is the receiver's, so it covers every codec.
    """

    name: ClassVar[str] = "mean_only"
    mean: Tensor

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract)
        self.register_buffer("mean", torch.zeros(contract.receiver.floats_per_token))

    @torch.no_grad()
    def solve_from(self, sums: Sums) -> None:
        """Take the receiver's mean entry."""
        self.mean.copy_(sums.y / sums.n)

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.mean.expand(kv.n_batch, kv.n_tokens, -1), self.contract.receiver)
