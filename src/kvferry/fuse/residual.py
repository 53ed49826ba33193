"""Residual fusion: what fusers give is rotated to where the receiver's tokens stand and added to its cache.

A slot to which nothing is added keeps its bits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.fuse.contract import Fuser
from kvferry.fuse.merge import Conflict, merge
from kvferry.fuse.space import to_space
from kvferry.kv import KV, Group, KeySpace

Contribution = tuple[Fuser, KV]
"""What one sender gave, on the receiver's tokens, and the fuser for it."""


def enriched(own: KV, senders: Sequence[Contribution], conflict: Conflict = "sum") -> KV:
    """The receiver's own cache with the residual of every sender added; their order changes no bit.

    Caches may be in either key space, the result is in that of `own`. Differentiable in the fusers. Raises
    `UsageError` for a fuser that gives no residual, and what the fusers raise.
    """
    if not senders:
        return own
    spaces: set[KeySpace] = {fuser.space for fuser, _ in senders}
    views = {space: to_space(own, space) for space in spaces}
    residuals = [_residual(fuser, views[fuser.space], arrived, own) for fuser, arrived in senders]
    return add(own, merge(residuals, conflict))


def _residual(fuser: Fuser, own: KV, arrived: KV, home: KV) -> KV:
    """In the key space and at the positions of `home`. Rotation is linear: it may be put on before adding."""
    if fuser.gives != "residual":
        cure = "Inject its cache (models.state.inject), or choose a fuser that gives a residual"
        raise UsageError(f"fuser {fuser.name} gives a whole cache, not a residual", cure=cure)
    residual = fuser(own, to_space(arrived, fuser.space))
    placed = replace(residual, positions=home.positions, call_length=home.call_length)
    return to_space(placed, home.space)


def add(own: KV, residual: KV) -> KV:
    """`own` plus a residual of the same slots and key space, in the dtypes of `own`, where both are present.

    Raises `ShapeMismatch` for a residual of other slots, layers or key space.
    """
    if (residual.geometry.model, residual.space) != (own.geometry.model, own.space):
        raise ShapeMismatch("a residual of another model or key space", cure="Give one made for this cache")
    if residual.present.shape != own.present.shape:
        got = f"a residual of {tuple(residual.present.shape[1:])} slots for {tuple(own.present.shape[1:])}"
        raise ShapeMismatch(got, cure="Give one made for this cache")
    written = own.present & residual.present
    pairs = zip(own.groups, residual.groups, strict=True)
    return own.with_groups(tuple(_add_group(one, more, written) for one, more in pairs))


def _add_group(own: Group, more: Group, written: Bool[Tensor, "all_layers batch tokens"]) -> Group:
    where = written[list(own.layers)][:, :, None, :, None]
    return Group(own.layers, _plus(own.keys, more.keys, where), _plus(own.values, more.values, where))


def _plus(
    own: Float[Tensor, "layers batch heads tokens dim"],
    residual: Float[Tensor, "layers batch heads tokens dim"],
    where: Bool[Tensor, "layers batch 1 tokens 1"],
) -> Float[Tensor, "layers batch heads tokens dim"]:
    # Not own + residual: -0.0 + 0.0 is 0.0, another bit pattern. Taking 0.0 away changes no number at all.
    total = own - (0.0 - residual)
    return torch.where(where, total.to(own.dtype), own)
