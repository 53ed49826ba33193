"""The end of what was read as a stand-in for a question about what came before."""

import torch
from jaxtyping import Bool
from torch import Tensor

from kvferry.select.attention import Posed, pose_last
from kvferry.select.sight import Sight


def probe(sight: Sight, layer: int, window: int) -> Posed:
    """The last `window` queries of a layer, of half the tokens at most."""
    return pose_last(sight, layer, max(min(window, sight.read.n_tokens // 2), 1))


def context(sight: Sight, posed: Posed) -> Bool[Tensor, " tokens"]:
    """The tokens before those queries that a slot carries."""
    n_tokens = sight.read.n_tokens
    before = torch.arange(n_tokens, device=sight.read.device) < n_tokens - posed.queries.shape[2]
    return before & sight.carried.any(0)
