"""The naive map, as a control: cut what is too much, fill with zeros what is missing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Unfitted
from kvferry.kv import KV, Geometry, Group, LayerGeometry


class ZeroPad(Unfitted):
    """Layer i becomes layer i, head h head h, channel c channel c.

    It only fits the shapes: no coordinate of one model means anything in another. What it scores is what shape alone
    is worth.
    """

    name: ClassVar[str] = "zero_pad"

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        receiver = self.contract.receiver
        groups = tuple(_group(kv, receiver, members) for members in receiver.groups())
        present = kv.present.all(0).expand(receiver.n_layers, -1, -1)
        return replace(kv, geometry=receiver, groups=groups, present=present)


def _group(kv: KV, receiver: Geometry, members: Sequence[int]) -> Group:
    layer = receiver.layers[members[0]]
    pairs = [_layer(kv, index, layer) for index in members]
    return Group(
        tuple(members), torch.stack([keys for keys, _ in pairs]), torch.stack([values for _, values in pairs])
    )


def _layer(kv: KV, index: int, layer: LayerGeometry) -> tuple[Tensor, Tensor]:
    if index >= kv.geometry.n_layers:
        empty = torch.zeros(kv.n_batch, 0, kv.n_tokens, 0, device=kv.device)
        return _fit(empty, layer.heads, layer.key_dim), _fit(empty, layer.heads, layer.value_dim)
    keys, values = kv.layer(index)
    return _fit(keys, layer.heads, layer.key_dim), _fit(values, layer.heads, layer.value_dim)


def _fit(
    states: Float[Tensor, "batch some_heads tokens some_dim"], heads: int, dim: int
) -> Float[Tensor, "batch heads tokens dim"]:
    cut = states.float()[:, :heads, :, :dim]
    missing = (0, dim - cut.shape[-1], 0, 0, 0, heads - cut.shape[1])
    return torch.nn.functional.pad(cut, missing)
