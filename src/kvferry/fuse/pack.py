"""Several caches one after the other as one: each at positions of its own, in an order that arrival does not change."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.fuse.layout import relay_layout
from kvferry.kv import KV, Group, Spans, stack


def pack(caches: Sequence[KV], strides: Sequence[float] | None = None) -> KV:
    """Aligned content-space caches of several senders as one prefix, the same to the bit for every order of arrival.

    Sequence by sequence they are ordered by the hash of their content, so a batch gives what its members give alone; of
    caches that agree in everything one is kept, so that a message delivered twice counts once. `strides` are those of
    the aligners (default 1.0). Positions in the result are the receiver's: lay it out with a stride of 1.0.
    Raises `UsageError` for no caches, `ShapeMismatch` for caches of different models or batches.
    """
    if not caches:
        raise UsageError("no caches to pack", cure="Give one at least")
    if len({kv.n_batch for kv in caches}) > 1:
        raise ShapeMismatch(f"batches of {[kv.n_batch for kv in caches]}", cure="Give caches of one batch")
    placed = [_placed(kv, stride) for kv, stride in zip(caches, strides or [1.0] * len(caches), strict=True)]
    return stack([_pack_row(row) for row in zip(*(kv.sequences() for kv in placed), strict=True)])


def _placed(kv: KV, stride: float) -> KV:
    kv.require_space("content")
    return replace(kv, positions=relay_layout(kv, 0, stride).positions.unsqueeze(0))


def _pack_row(caches: Sequence[KV]) -> KV:
    distinct = {content_hash(kv): kv for kv in caches}
    return join([distinct[digest] for digest in sorted(distinct)])


def content_hash(kv: KV) -> bytes:
    """SHA-256 of what a cache says: numbers, which layer holds what, positions, spans. Waits for the device."""
    digest = hashlib.sha256(kv.geometry.model.encode())
    tensors = [part.float() for group in kv.groups for part in (group.keys, group.values)]
    for tensor in (*tensors, kv.present, kv.positions.long()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for spans in kv.spans:
        for numbers in (spans.part, spans.start, spans.end, spans.role):
            digest.update(numbers.tobytes())
    return digest.digest()


def join(caches: Sequence[KV]) -> KV:
    """Content-space caches of one model in the given order, the positions of each counted on from the one before.

    Raises `ShapeMismatch` for caches of different models.
    """
    first = caches[0]
    for kv in caches:
        kv.require_space("content")
        if (kv.geometry, kv.n_batch) != (first.geometry, first.n_batch):
            raise ShapeMismatch("caches of different models or batches", cure="Align them to one receiver")
    return replace(
        first,
        groups=tuple(_join_groups([kv.groups[i] for kv in caches]) for i in range(len(first.groups))),
        present=torch.cat([kv.present for kv in caches], -1),
        positions=_count_on(caches),
        spans=tuple(_join_spans(rows) for rows in zip(*(kv.spans for kv in caches), strict=True)),
        call_length=max(kv.call_length for kv in caches),
    )


def _join_groups(groups: Sequence[Group]) -> Group:
    keys, values = ([getattr(group, what) for group in groups] for what in ("keys", "values"))
    return Group(groups[0].layers, torch.cat(keys, -2), torch.cat(values, -2))


def _count_on(caches: Sequence[KV]) -> torch.Tensor:
    positions, start = [], torch.zeros(caches[0].n_batch, 1, dtype=torch.long, device=caches[0].device)
    for kv in caches:
        layout = relay_layout(kv, 0)
        positions.append(layout.positions + start)
        start = start + layout.next_position.to(start.device).unsqueeze(-1)
    return torch.cat(positions, -1).unsqueeze(0)


def _join_spans(rows: Sequence[Spans]) -> Spans:
    part, start, end, role = (
        np.concatenate([getattr(spans, what) for spans in rows]) for what in ("part", "start", "end", "role")
    )
    return Spans(part, start, end, role)
