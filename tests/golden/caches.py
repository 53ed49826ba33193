"""The caches of the goldens: made of whole numbers, so that no generator of random numbers can change them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

import contract
from kvferry.kv import KV, Group, Plan

SMALL = ((2, 4, 6), (1, 3, 3), (2, 4, 6))
LONG = ((2, 3, 2),)
WIDE = ((2, 12, 12),)


def small() -> tuple[KV, Plan]:
    """Layers of two shapes, holes, a gap in the positions, roles."""
    roles = np.array([1, 2, 0, 0, 0, 0, 0, 3], np.uint8)
    kv = _filled(contract.cache(SMALL, n_tokens=8, spans=(contract.spans(8, roles),), call_length=9))
    positions = kv.positions + (kv.positions > 4).long()
    plan = Plan.everything(kv)
    plan.classes[1, :, 2:4] = 0
    plan.classes[:, :, 5] = 0
    return replace(kv, positions=positions), plan


def long() -> tuple[KV, Plan]:
    """More tokens than a frame of coarse levels has, and enough for a second stage."""
    kv = _filled(contract.cache(LONG, n_tokens=80))
    return kv, Plan.everything(kv)


def classes() -> tuple[KV, Plan]:
    """Tokens of three precisions."""
    kv, plan = small()
    plan.classes[0, 1, :2] = 3
    plan.classes[2, :, 6:] = 2
    return kv, plan


def wide() -> tuple[KV, Plan]:
    """Enough numbers for several lanes of the entropy coder."""
    kv = _filled(contract.cache(WIDE, n_tokens=70))
    return kv, Plan.everything(kv)


def grid() -> tuple[KV, Plan]:
    """On the receiver's tokens, in every overlap class."""
    kv, plan = small()
    (row,) = kv.spans
    return replace(kv, spans=(replace(row, overlap=np.arange(8, dtype=np.uint8)),)), plan


CACHES: dict[str, Callable[[], tuple[KV, Plan]]] = {
    "small": small,
    "long": long,
    "classes": classes,
    "wide": wide,
    "grid": grid,
}


def _filled(kv: KV) -> KV:
    """Channels of different size and mean; every number is a multiple of 1/64 and exact in float16."""
    groups = tuple(Group(g.layers, _numbers(g.keys, 1), _numbers(g.values, 2)) for g in kv.groups)
    return kv.with_groups(groups)


def _numbers(like: torch.Tensor, seed: int) -> torch.Tensor:
    index = torch.arange(like.numel()).reshape(like.shape)
    channel = torch.arange(like.shape[-1])
    spread = (index * index * 31 + index * 17 * seed + 7) % 251 - 125
    spread = spread * (index % 5 > 1)  # many zeros, which a second stage finds
    return (spread * 2.0 ** (channel % 3 - 7) + 3 * (channel % 4)).float()
