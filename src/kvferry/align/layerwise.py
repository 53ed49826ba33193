"""A cache in the receiver's geometry, made layer by layer."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvferry.kv import KV, Geometry, Group, LayerGeometry

Layer = tuple[Tensor, Tensor]
"""Keys and values, `[batch, heads, tokens, key_dim]` and `[batch, heads, tokens, value_dim]`."""


def layer_by_layer(kv: KV, receiver: Geometry, make: Callable[[int, LayerGeometry], Layer]) -> KV:
    """The cache whose layer `i` is what `make` gives for its number and shape. A token that any layer lacks is lost."""
    groups = []
    for members in receiver.groups():
        made = [make(index, receiver.layers[index]) for index in members]
        keys, values = (torch.stack(states) for states in zip(*made, strict=True))
        groups.append(Group(members, keys, values))
    present = kv.present.all(0).expand(receiver.n_layers, -1, -1)
    return replace(kv, geometry=receiver, groups=tuple(groups), present=present)
