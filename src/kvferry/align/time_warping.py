"""Two readings of one text in segments (steps, sentences, frames): as many tokens per segment as the other one has."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.resample import resample
from kvferry.align.shares import shares
from kvferry.kv import KV

NO_SEGMENT = -1
"""Of padding."""


class TimeWarping(nn.Module):
    """Resamples a cache within each segment; it has no parameters.

    Fewer tokens than there were are means over equal stretches; more are interpolated between neighbours; as many are
    the same. Each row of a batch has its own segments, and content-space keys are asked for: both go wrong elsewhere.
    """

    def forward(self, kv: KV, sent: Int[Tensor, "batch tokens"], held: Int[Tensor, "batch slots"]) -> KV:
        """`sent` and `held` name the segment of each token that is there, and that there shall be."""
        return resample(kv, warp_weights(sent, held))


def warp_weights(
    sent: Int[Tensor, "batch tokens"], held: Int[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots tokens"]:
    """What each slot takes from each token of its segment. Rows sum to one, or to zero where the segment is empty."""
    same = (held.unsqueeze(-1) == sent.unsqueeze(-2)) & (held != NO_SEGMENT).unsqueeze(-1)
    n_held, n_sent = _size(held).unsqueeze(-1), same.sum(-1, keepdim=True)
    slot, token = _rank(held).unsqueeze(-1), _rank(sent).unsqueeze(-2)
    centre = (slot + 0.5).double() * n_sent / n_held - 0.5
    centre = torch.minimum(centre.clamp(min=0), (n_sent - 1).clamp(min=0).double())
    between = (1 - (centre - token).abs()).clamp(min=0).float()
    over = shares(slot, n_held, token, n_sent.clamp(min=1))
    return torch.where(n_held < n_sent, over, between) * same


def segments(counts: Sequence[Sequence[int]]) -> Int[Tensor, "batch slots"]:
    """Segment numbers for so many tokens in each segment of each row, padded on the left.

    >>> segments([[2, 1], [3, 2]])
    tensor([[-1, -1,  0,  0,  1],
            [ 0,  0,  0,  1,  1]])
    """
    width = max(sum(row) for row in counts)
    rows = torch.full((len(counts), width), NO_SEGMENT)
    for row, numbers in zip(rows, counts, strict=True):
        row[width - sum(numbers) :] = torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers))
    return rows


def _size(rows: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """How many tokens the segment of each token has."""
    return (rows.unsqueeze(-1) == rows.unsqueeze(-2)).sum(-1)


def _rank(rows: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """How many tokens of its segment stand before each token."""
    return (rows.unsqueeze(-1) == rows.unsqueeze(-2)).tril(-1).sum(-1)
