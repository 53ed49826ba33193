"""A cache on the other model's tokens: each target token gets what the sender's tokens over the same bytes hold.

Keys must be without rotation: a mean of keys that were rotated to different positions is no key.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kvferry.align.spans import Matches, same_place, shared_bytes
from kvferry.errors import EmptyContext, ShapeMismatch, UnknownName
from kvferry.kv import KV, Group, Role, Spans


def pool(kv: KV, targets: Sequence[Spans], how: str = "weighted") -> KV:
    """The sender's cache with one slot for each token of `targets`, a row for each sequence.

    `weighted` weighs source tokens by the bytes that they share with the target token, `mean` weighs all that share
    any alike, `last` takes the last of them, which has seen the others. A slot is present where all source tokens that
    it takes are; absent ones hold zeros. Positions count the target's tokens. Where tokens are the same, every number
    is the same to the bit.
    Raises `WrongKeySpace`, `UnknownName`, `ShapeMismatch` for another number of rows, `EmptyContext` for no slots.
    """
    kv.require_space("content")
    if len(targets) != kv.n_batch:
        raise ShapeMismatch(f"targets for {len(targets)} of {kv.n_batch} sequences", cure="Give one for each")
    if kv.n_tokens == 0:
        raise EmptyContext("a cache of no tokens cannot be pooled", cure="Give the sender something to read")
    width = max(map(len, targets), default=0)
    spans = tuple(target.widen(width) for target in targets)
    index, weight = (part.to(kv.device) for part in _lists(spans, kv.spans, how))
    slots = kv.present[:, torch.arange(kv.n_batch, device=kv.device)[:, None, None], index]
    present = (slots | (weight == 0)).all(-1) & (weight > 0).any(-1)
    counted = torch.from_numpy(np.stack([row.role != Role.PAD for row in spans])).to(kv.device).long()
    return replace(
        kv,
        groups=tuple(_pooled(group, index, weight, present) for group in kv.groups),
        present=present,
        positions=(counted.cumsum(-1) - 1).clamp(min=0).expand(len(kv.positions), -1, -1),
        spans=spans,
    )


def pooling_weights(target: Spans, source: Spans, how: str = "weighted") -> NDArray[np.float32]:
    """Weights `[target tokens, source tokens]`. A row sums to one, or to zero where nothing corresponds."""
    found, weight = _weighed(target, source, how)
    dense = np.zeros((len(target), len(source)), np.float32)
    dense[found.rows, found.columns] = weight
    return dense


def _by_bytes(found: Matches) -> NDArray[np.float32]:
    total = np.bincount(found.rows, found.n_bytes)[found.rows]
    return (found.n_bytes / total).astype(np.float32)


def _alike(found: Matches) -> NDArray[np.float32]:
    return (1 / np.bincount(found.rows)[found.rows]).astype(np.float32)


def _only_last(found: Matches) -> NDArray[np.float32]:
    return np.append(np.diff(found.rows), 1).astype(bool)[: len(found.rows)].astype(np.float32)


POOLINGS: dict[str, Callable[[Matches], NDArray[np.float32]]] = {
    "weighted": _by_bytes,
    "mean": _alike,
    "last": _only_last,
}
"""How the tokens that share text with one token are weighed."""


def _weighed(target: Spans, source: Spans, how: str) -> tuple[Matches, NDArray[np.float32]]:
    """All corresponding pairs of positive weight, and the weights."""
    if how not in POOLINGS:
        raise UnknownName("pooling", how, POOLINGS)
    text, placed = shared_bytes(target, source), same_place(target, source)
    weight = np.concatenate([POOLINGS[how](text), np.ones(len(placed.rows), np.float32)])
    rows, columns = (
        np.concatenate(pair) for pair in ((text.rows, placed.rows), (text.columns, placed.columns))
    )
    order = np.argsort(rows, kind="stable")
    order = order[weight[order] > 0]
    return Matches(rows[order], columns[order], np.zeros(len(order), np.int64)), weight[order]


def _lists(
    targets: Sequence[Spans], sources: Sequence[Spans], how: str
) -> tuple[Int[Tensor, "batch tokens most"], Float[Tensor, "batch tokens most"]]:
    """For each target token its source tokens and their weights, filled up with its first one at weight zero."""
    rows = [_weighed(target, source, how) for target, source in zip(targets, sources, strict=True)]
    most = max(1, *(np.bincount(found.rows, minlength=1).max() for found, _ in rows))
    index = np.zeros((len(rows), len(targets[0]), most), np.int64)
    weight = np.zeros(index.shape, np.float32)
    for row, (found, values) in enumerate(rows):
        rank = np.arange(len(found.rows)) - np.searchsorted(found.rows, found.rows)
        index[row, found.rows, rank], weight[row, found.rows, rank] = found.columns, values
    return torch.from_numpy(np.where(weight > 0, index, index[..., :1])), torch.from_numpy(weight)


def _pooled(
    group: Group,
    index: Int[Tensor, "batch tokens most"],
    weight: Float[Tensor, "batch tokens most"],
    present: Bool[Tensor, "all_layers batch tokens"],
) -> Group:
    held = present[list(group.layers)][:, :, None, :, None]
    keys, values = (_mixed(states, index, weight, held) for states in (group.keys, group.values))
    return Group(group.layers, keys, values)


def _mixed(
    states: Float[Tensor, "layers batch heads sources dim"],
    index: Int[Tensor, "batch tokens most"],
    weight: Float[Tensor, "batch tokens most"],
    held: Bool[Tensor, "layers batch 1 tokens 1"],
) -> Float[Tensor, "layers batch heads tokens dim"]:
    """The sums, one source at a time: as fast as a copy, and the same in every batch."""
    layers, batch, heads, _, dim = states.shape
    total = torch.zeros((), device=states.device)
    for source, share in zip(index.unbind(-1), weight.unbind(-1), strict=True):
        where = source[None, :, None, :, None].expand(layers, batch, heads, -1, dim)
        total = total + states.gather(3, where).float() * share[None, :, None, :, None]
    return torch.where(held, total, 0.0).to(states.dtype)
