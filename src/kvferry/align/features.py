"""A token's whole cache entry as one vector, and back."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kvferry.errors import UsageError
from kvferry.kv import KV, Geometry, Group


def flatten(kv: KV) -> Float[Tensor, "batch tokens features"]:
    """Keys, then values, of all layers and heads of each token, fp32. Order: group, K|V, layer, head, channel."""
    parts = [part for group in kv.groups for part in (group.keys, group.values)]
    return torch.cat([part.float().permute(1, 3, 0, 2, 4).flatten(2) for part in parts], -1)


def with_neighbours(kv: KV, n: int) -> Float[Tensor, "batch tokens wide"]:
    """`flatten` of each token, of the one before, ... of the `n - 1`-th before; zero where there is none."""
    return look_back(flatten(kv) * kv.present.all(0).unsqueeze(-1), n)


def look_back(features: Float[Tensor, "batch tokens features"], n: int) -> Float[Tensor, "batch tokens wide"]:
    """`with_neighbours` for features in the hand, which are zero for tokens that are not there.

    Raises `UsageError` for fewer than 1, the token itself.
    """
    if n < 1:
        raise UsageError(f"neighbours is {n}, out of range", cure="Give at least 1, the token itself")
    n_tokens = features.shape[1]
    return torch.cat([functional.pad(features, (0, 0, back, 0))[:, :n_tokens] for back in range(n)], -1)


def unflatten(features: Float[Tensor, "batch tokens features"], geometry: Geometry) -> tuple[Group, ...]:
    """The inverse of `flatten` for a geometry of as many floats per token."""
    groups, start = [], 0
    for members in geometry.groups():
        layer = geometry.layers[members[0]]
        parts = []
        for dim in (layer.key_dim, layer.value_dim):
            width = len(members) * layer.heads * dim
            part = features[..., start : start + width].unflatten(-1, (len(members), layer.heads, dim))
            parts.append(part.permute(2, 0, 3, 1, 4))
            start += width
        groups.append(Group(members, parts[0], parts[1]))
    return tuple(groups)


def as_receiver(kv: KV, features: Float[Tensor, "batch tokens features"], receiver: Geometry) -> KV:
    """The cache `kv` with `features` in the receiver's geometry. A token that any layer lacks is lost."""
    present = kv.present.all(0).expand(receiver.n_layers, -1, -1)
    return replace(kv, geometry=receiver, groups=unflatten(features, receiver), present=present)
