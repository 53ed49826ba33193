"""There and back: a small model's cache widened to a large one's, and a large one's narrowed and shortened."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import flatten
from kvferry.align.kv_projector import KVCacheProjector
from kvferry.align.parts import Layers
from kvferry.align.resample import resample
from kvferry.align.ridge import Sums
from kvferry.align.time_warping import NO_SEGMENT
from kvferry.kv import KV

Reduce = Callable[[Tensor, Tensor, int], Tensor]
"""Scores `[batch, tokens]`, which tokens are there, a number of slots: weights `[batch, slots, tokens]`."""


class BiDirectionalProjector(Aligner):
    """A `KVCacheProjector` each way. As an aligner it expands; `forward_compress` answers in the sender's geometry.

    The published compression weights the tokens and leaves them all in place, each smaller by their number. Here a
    slot is a mean over tokens, or a token, and there are as many slots as asked for.
    """

    name: ClassVar[str] = "bidirectional"
    neighbours = 1

    def __init__(self, contract: Contract, sources: Layers | None = None, back: Layers | None = None) -> None:
        super().__init__(contract)
        turned = replace(
            contract, sender=contract.receiver, receiver=contract.sender, stride=1 / contract.stride
        )
        self.expand = KVCacheProjector(contract, sources)
        self.compress = KVCacheProjector(turned, back)
        self.score = nn.Parameter(torch.zeros(contract.receiver.floats_per_token))

    def options(self) -> dict[str, Any]:
        return {"sources": self.expand.sources, "back": self.compress.sources}

    def forward(self, kv: KV) -> KV:
        return self.expand(kv)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features."""
        return self.expand.map(wide)

    def forward_expand(self, kv: KV) -> KV:
        """The small model's cache as the large one would hold it."""
        return self.expand(kv)

    def forward_compress(self, kv: KV, n_tokens: int, reduce: "Reduce | None" = None) -> KV:
        """The large model's cache as the small one would hold it, in at most `n_tokens` tokens.

        `reduce` is `pooled`, the default, or `top`. A sequence that is short enough keeps its tokens.
        """
        even = (flatten(kv) - self.compress.x_mean) / self.compress.x_std
        weights = (reduce or pooled)(even @ self.score, kv.present.all(0), n_tokens)
        return self.compress(resample(kv, weights))

    @torch.no_grad()
    def start_from(self, sums: Sums, back: Sums, penalty: float) -> None:
        """Become two ridge maps; `back` are the sums with the models changed over. Scores start equal."""
        self.expand.start_from(sums, penalty)
        self.compress.start_from(back, penalty)
        self.score.zero_()


def pooled(
    scores: Float[Tensor, "batch tokens"], present: Bool[Tensor, "batch tokens"], n_slots: int
) -> Float[Tensor, "batch slots tokens"]:
    """Equal stretches of tokens, each a mean weighted by the softmax of its own scores; unused slots come first.

    >>> pooled(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 2)
    tensor([[[0.5000, 0.5000, 0.0000, 0.0000],
             [0.0000, 0.0000, 0.5000, 0.5000]]])
    """
    n_held = present.sum(-1, keepdim=True)
    n_used = n_held.clamp(max=n_slots)
    rank = present.cumsum(-1) - 1
    slot = n_slots - n_used + rank * n_used // n_held.clamp(min=1)
    slot = torch.where(present, slot, NO_SEGMENT).unsqueeze(1)
    own = slot == torch.arange(n_slots, device=slot.device).unsqueeze(-1)
    return torch.where(own, scores.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num()


def top(
    scores: Float[Tensor, "batch tokens"], present: Bool[Tensor, "batch tokens"], n_slots: int
) -> Float[Tensor, "batch slots tokens"]:
    """The tokens of the highest scores, in their order. No gradient reaches the scores."""
    found = torch.where(present, scores, -torch.inf).topk(min(n_slots, scores.shape[-1])).indices
    slots = found.sort(-1).values.unsqueeze(-1) == torch.arange(scores.shape[-1], device=scores.device)
    return (slots & present.unsqueeze(1)).float()
