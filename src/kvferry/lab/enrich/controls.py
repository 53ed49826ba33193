"""What arrives instead of the item's own cache, and a fuser that adds nothing."""

import copy
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.fuse.contract import Fuser
from kvferry.kv import KV
from kvferry.lab.items import swapped


def zeroed(kv: KV) -> KV:
    """Zeros for numbers."""
    groups = (replace(g, keys=torch.zeros_like(g.keys), values=torch.zeros_like(g.values)) for g in kv.groups)
    return kv.with_groups(tuple(groups))


def averaged(kv: KV) -> KV:
    """Each slot holds the mean over the batch. Slots are counted from the end, where the questions stand.

    So it keeps what a mean over all slots would lose: what any question looks like at this place.
    """
    groups = (
        replace(g, keys=_mean(g.keys, held), values=_mean(g.values, held))
        for g in kv.groups
        for held in [kv.present[list(g.layers)][:, :, None, :, None]]
    )
    return kv.with_groups(tuple(groups))


def of_twins(kv: KV) -> KV:
    """Each row gets the cache of its twin: the same question in another world."""
    return kv.take_batch(swapped(kv.n_batch))


@torch.no_grad()
def closed(fuser: Fuser) -> Fuser:
    """A copy with all gates closed."""
    shut = copy.deepcopy(fuser)
    for name, parameter in shut.named_parameters():
        if name.split(".")[-1] == "gate":
            parameter.fill_(-1.0)
    return shut


def _mean(
    states: Float[Tensor, "layers batch heads tokens dim"], held: Bool[Tensor, "layers batch 1 tokens 1"]
) -> Float[Tensor, "layers batch heads tokens dim"]:
    total = (states * held).sum(1, keepdim=True)
    return (total / held.sum(1, keepdim=True).clamp(min=1)).expand_as(states)
