"""How alike predicted entries are to a model's own, with and without what all tokens share.

Keys of a head lie close around their mean, so the plain cosine is near one for a vector that says nothing: for the mean
itself, and for the key of another token. Beside a plain cosine belong these two, or read the centred measures.
Shapes as in `kvferry.kv`; all are by head, over the tokens in `mask`; what stands elsewhere has no influence.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Entries = Float[Tensor, "batch heads tokens dim"]
Held = Bool[Tensor, "batch tokens"]
PerHead = Float[Tensor, " heads"]


def plain_cosine(predicted: Entries, target: Entries, mask: Held) -> PerHead:
    """Mean cosine of each token's entry with its prediction."""
    got, want = (_rows(entries, mask) for entries in (predicted, target))
    return _mean((_unit(got) * _unit(want)).sum(-1), mask)


def centred_cosine(predicted: Entries, target: Entries, mask: Held) -> PerHead:
    """The same, both from the target's mean: zero for that mean itself."""
    got, want = (_rows(entries, mask) for entries in (predicted, target))
    centre = _centre(want, mask)
    return _mean((_unit(_held(got - centre, mask)) * _unit(_held(want - centre, mask))).sum(-1), mask)


def centred_r2(predicted: Entries, target: Entries, mask: Held) -> PerHead:
    """1 - (squared error) / (the target's spread around its mean): 1 is equal, 0 what the mean reaches, no floor.

    >>> target = torch.tensor([[[[1.0], [3.0]]]])
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> centred_r2(torch.full_like(target, 2.0), target, mask).item()
    0.0
    """
    got, want = (_rows(entries, mask) for entries in (predicted, target))
    left = (got - want).square().sum((1, 2))
    spread = _held(want - _centre(want, mask), mask).square().sum((1, 2))
    return 1 - left / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def mean_vector_cosine(target: Entries, mask: Held) -> PerHead:
    """The plain cosine that a map reaches which says the mean of every token."""
    want = _rows(target, mask)
    return _mean((_unit(want) * _unit(_centre(want, mask))).sum(-1), mask)


def other_token_cosine(target: Entries, mask: Held) -> PerHead:
    """The plain cosine that shuffled tokens reach: the mean over all pairs of different tokens."""
    units = _unit(_rows(target, mask))
    n = mask.sum()
    alone = units.square().sum((1, 2))
    return (units.sum(1).square().sum(-1) - alone) / (n * (n - 1)).clamp(min=1)


def _rows(entries: Entries, mask: Held) -> Float[Tensor, "heads rows dim"]:
    """By head, all slots of the batch in a row, absent ones zero."""
    exact = entries.to(torch.promote_types(entries.dtype, torch.float32))
    return exact.masked_fill(~mask[:, None, :, None], 0.0).transpose(0, 1).flatten(1, 2)


def _held(rows: Float[Tensor, "heads rows dim"], mask: Held) -> Float[Tensor, "heads rows dim"]:
    return rows * mask.flatten()[None, :, None]


def _centre(rows: Float[Tensor, "heads rows dim"], mask: Held) -> Float[Tensor, "heads 1 dim"]:
    return rows.sum(1, keepdim=True) / mask.sum().clamp(min=1)


def _mean(each: Float[Tensor, "heads rows"], mask: Held) -> PerHead:
    return (each * mask.flatten()).sum(-1) / mask.sum().clamp(min=1)


def _unit(rows: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n dim"]:
    return torch.nn.functional.normalize(rows, dim=-1)
