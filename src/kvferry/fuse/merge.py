"""The residuals of several senders as one, the same to the bit whichever came first.

Floating-point sums depend on their order, so contributions are sorted before they are added, number by number. That
needs no names and no hash, works where the tensors lie, and lets gradients through.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.kv import KV, Group

Conflict = Literal["sum", "mean", "strongest"]
"""What to do where several senders write the same slot of a layer.

sum        add them all (what the published code calls parallel)
mean       their average, so that more senders do not mean larger changes
strongest  the one with the largest residual there (the average of those that tie)
"""


def merge(residuals: Sequence[KV], conflict: Conflict = "sum") -> KV:
    """One residual of residuals for the same slots; a slot of a layer is written if any of them writes it.

    Raises `UsageError` for none, `ShapeMismatch` for residuals of different slots.
    """
    _check(residuals)
    first = residuals[0]
    if len(residuals) == 1:  # the common case should not cost a copy
        return first
    weights = _weights(residuals, conflict)
    groups = (_merge_groups([kv.groups[i] for kv in residuals], weights) for i in range(len(first.groups)))
    present = torch.stack([kv.present for kv in residuals]).any(0)
    return replace(first, groups=tuple(groups), present=present)


def _check(residuals: Sequence[KV]) -> None:
    if not residuals:
        raise UsageError("no residuals to merge", cure="Give one at least")
    kinds = {(kv.geometry.model, kv.space, kv.present.shape) for kv in residuals}
    if len(kinds) > 1:
        raise ShapeMismatch(
            "residuals of different slots, models or key spaces", cure="Make them for one cache"
        )


def _weights(residuals: Sequence[KV], conflict: Conflict) -> Float[Tensor, "senders layers batch tokens"]:
    """How much of each sender's residual counts; zero where it writes nothing."""
    held = torch.stack([kv.present for kv in residuals])
    if conflict == "strongest":
        size = torch.stack([_size(kv) for kv in residuals]).masked_fill(~held, -1)
        held = held & (size == size.amax(0))
    weights = held.float()
    return weights if conflict == "sum" else weights / weights.sum(0).clamp(min=1)


def _size(kv: KV) -> Float[Tensor, "layers batch tokens"]:
    """Squared length of a token's keys and values, layer by layer."""
    out = torch.zeros(kv.present.shape, device=kv.device)
    for group in kv.groups:
        parts = (group.keys.detach(), group.values.detach())
        out[list(group.layers)] = sum(part.float().square().sum((2, 4)) for part in parts)
    return out


def _merge_groups(groups: Sequence[Group], weights: Float[Tensor, "senders layers batch tokens"]) -> Group:
    layers = groups[0].layers
    here = weights[:, list(layers), :, None, :, None]
    keys = [_weighted(group.keys, weight) for group, weight in zip(groups, here, strict=True)]
    values = [_weighted(group.values, weight) for group, weight in zip(groups, here, strict=True)]
    return Group(layers, _ordered_sum(keys), _ordered_sum(values))


def _weighted(
    states: Float[Tensor, "layers batch heads tokens dim"], weight: Float[Tensor, "layers batch 1 tokens 1"]
) -> Float[Tensor, "layers batch heads tokens dim"]:
    absent: Bool[Tensor, "layers batch 1 tokens 1"] = weight == 0
    return states.masked_fill(absent, 0) * weight


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum from the smallest number to the largest, element by element (a sorting network: senders are few)."""
    row = list(parts)
    for end in range(len(row) - 1, 0, -1):
        for i in range(end):
            row[i], row[i + 1] = torch.minimum(row[i], row[i + 1]), torch.maximum(row[i], row[i + 1])
    return reduce(torch.add, row)
