"""Runs: neighbouring slots that hold one and the same entry.

On the receiver's grid a sender's token that spans several receiver tokens stands in each of them. What tells these
slots apart is only how deep in the run they lie, and what stands before is the run before, not the slot before.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from kvferry.align.features import flatten
from kvferry.kv import KV

SAME = 0.03
"""Squared distance over squared length below which two entries are one: codecs err by less, tokens differ by more."""


def in_runs(
    kv: KV, neighbours: int, places: int
) -> tuple[Float[Tensor, "batch tokens wide"], Int[Tensor, "batch tokens"]]:
    """Each slot's entry, that of the run before, ... of the `neighbours - 1`-th before; and its place in its run.

    Zero where there is no run; places count from 0 to at most `places - 1`. With `places` of one every slot is a run,
    as in `features.with_neighbours`.
    """
    entries = flatten(kv) * kv.present.all(0).unsqueeze(-1)
    slots = torch.arange(entries.shape[1], device=entries.device).expand(entries.shape[:2])
    begins = slots if places == 1 else torch.where(_begin(entries), slots, 0).cummax(1).values
    parts, last = [entries], begins - 1
    for _ in range(neighbours - 1):
        index = last.clamp(min=0)
        parts.append(_at(entries, index) * (last >= 0).unsqueeze(-1))
        last = torch.where(last >= 0, begins.gather(1, index) - 1, last)
    return torch.cat(parts, -1), (slots - begins).clamp(max=places - 1)


def _begin(entries: Float[Tensor, "batch tokens features"]) -> Bool[Tensor, "batch tokens"]:
    """Whether a slot holds another entry than the one before."""
    moved = (entries[:, 1:] - entries[:, :-1]).square().sum(-1)
    other = moved > SAME * entries[:, 1:].square().sum(-1)
    return functional.pad(other, (1, 0), value=True)


def _at(
    entries: Float[Tensor, "batch tokens features"], index: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens features"]:
    return entries.gather(1, index.unsqueeze(-1).expand_as(entries))
