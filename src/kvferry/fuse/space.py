"""A cache in the other key space: rotation put on, or taken off, at the cache's own positions."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import KV, Group, KeySpace
from kvferry.rope import rotate, strip


def to_space(kv: KV, space: KeySpace) -> KV:
    """The same cache with content or rotated keys, those in fp32 where they had to be turned. Differentiable."""
    if kv.space == space:
        return kv
    turn = strip if space == "content" else rotate
    groups = tuple(Group(group.layers, _turned(kv, group, turn), group.values) for group in kv.groups)
    return replace(kv, groups=groups, space=space)


def _turned(
    kv: KV, group: Group, turn: Callable[..., Tensor]
) -> Float[Tensor, "layers batch heads tokens dim"]:
    """Layers that rotate alike in one pass: in most models that is all of them."""
    specs = [kv.geometry.layers[index].rotary for index in group.layers]
    if len(set(specs)) == 1:
        return turn(group.keys, kv.positions, specs[0], kv.call_length)
    turned = zip(group.keys, specs, strict=True)
    return torch.stack([turn(keys, kv.positions, spec, kv.call_length) for keys, spec in turned])
