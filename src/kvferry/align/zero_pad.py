"""The naive map, as a control: cut what is too much, fill with zeros what is missing."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Unfitted
from kvferry.align.layerwise import Layer, layer_by_layer
from kvferry.kv import KV, LayerGeometry


class ZeroPad(Unfitted):
    """Layer i becomes layer i, head h head h, channel c channel c; what is missing is zero.

    It only fits the shapes: no coordinate of one model means anything in another. What it scores is what shape alone
    is worth, or less: a key of zeros is still attended to. `truncate` leaves no layer out.
    """

    name: ClassVar[str] = "zero_pad"

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")

        def make(index: int, layer: LayerGeometry) -> Layer:
            keys, values = _states(kv, index)
            return _fit(keys, layer.heads, layer.key_dim), _fit(values, layer.heads, layer.value_dim)

        return layer_by_layer(kv, self.contract.receiver, make)


def _states(kv: KV, index: int) -> Layer:
    empty = torch.zeros(kv.n_batch, 0, kv.n_tokens, 0, device=kv.device)
    return kv.layer(index) if index < kv.geometry.n_layers else (empty, empty)


def _fit(
    states: Float[Tensor, "batch some_heads tokens some_dim"], heads: int, dim: int
) -> Float[Tensor, "batch heads tokens dim"]:
    cut = states.float()[:, :heads, :, :dim]
    missing = (0, dim - cut.shape[-1], 0, 0, 0, heads - cut.shape[1])
    return torch.nn.functional.pad(cut, missing)
