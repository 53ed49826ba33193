"""The control without context: each token becomes the receiver's usual entry for tokens of that text.

A map that does no better than this table carries which token stood where, and nothing of what the sender understood.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Contract, Unfitted
from kvferry.align.features import as_receiver
from kvferry.align.token_means import PRIOR, TokenMeans
from kvferry.kv import KV


class TokenTable(Unfitted):
    """Recognises a token by the sender's first layer, which depends on the token alone, and looks it up.

    The nearest of the known first-layer entries decides, so coarse codecs hardly disturb it: it covers all of them.
    """

    name: ClassVar[str] = "token_table"
    marks: Tensor
    entries: Tensor

    def __init__(self, contract: Contract, n_tokens: int) -> None:
        super().__init__(contract)
        first = contract.sender.layers[0]
        self.n_tokens = n_tokens
        self.register_buffer("marks", torch.zeros(n_tokens, first.heads * (first.key_dim + first.value_dim)))
        self.register_buffer("entries", torch.zeros(n_tokens, contract.receiver.floats_per_token))

    def options(self) -> dict[str, Any]:
        return {"n_tokens": self.n_tokens}

    @torch.no_grad()
    def solve_from(self, means: TokenMeans) -> None:
        """Take the mean entries, each drawn to the mean of all where a token was seen rarely."""
        total = means.entries.sum(0) / means.counts.sum()
        self.marks.copy_(means.marks / means.counts)
        self.entries.copy_((means.entries + PRIOR * total) / (means.counts + PRIOR))

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        known = torch.cdist(first_layer(kv), self.marks.expand(kv.n_batch, -1, -1)).argmin(-1)
        return as_receiver(kv, self.entries[known], self.contract.receiver)


def first_layer(kv: KV) -> Float[Tensor, "batch tokens marks"]:
    """Keys and values of each token in the first layer."""
    return torch.cat([part.float().transpose(1, 2).flatten(2) for part in kv.layer(0)], -1)
