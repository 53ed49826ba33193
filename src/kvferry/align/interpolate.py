"""Linear interpolation to another shape, as a control: as smooth as can be, and still without meaning."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Unfitted
from kvferry.align.layerwise import Layer, layer_by_layer
from kvferry.kv import KV, LayerGeometry


class Interpolate(Unfitted):
    """Layers, heads and channels are each stretched or shrunk to the receiver's number, first to first, last to last.

    Neighbouring channels have nothing to do with each other, so nothing is gained by it over `truncate`. Where this is
    proposed, it is said to keep 75 % of task success; that figure was never measured.
    """

    name: ClassVar[str] = "interpolate"

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        receiver = self.contract.receiver
        shares = interpolation(kv.geometry.n_layers, receiver.n_layers).tolist()

        def make(index: int, layer: LayerGeometry) -> Layer:
            near = [(kv.layer(source), share) for source, share in enumerate(shares[index]) if share > 0]
            keys = sum(share * _resized(keys, layer.heads, layer.key_dim) for (keys, _), share in near)
            values = sum(
                share * _resized(values, layer.heads, layer.value_dim) for (_, values), share in near
            )
            return torch.as_tensor(keys), torch.as_tensor(values)

        return layer_by_layer(kv, receiver, make)


def interpolation(n_in: int, n_out: int) -> Float[Tensor, "out in"]:
    """Shares by which each of `n_out` points on a line is made of the `n_in` on it; rows sum to one.

    >>> interpolation(3, 2).tolist(), interpolation(2, 3).tolist()
    ([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    """
    place = torch.arange(n_out) * (n_in - 1) / (n_out - 1) if n_out > 1 else torch.tensor([(n_in - 1) / 2])
    return (1 - (place[:, None] - torch.arange(n_in)).abs()).clamp(min=0)


def _resized(
    states: Float[Tensor, "batch some_heads tokens some_dim"], heads: int, dim: int
) -> Float[Tensor, "batch heads tokens dim"]:
    by_head = interpolation(states.shape[1], heads).to(states.device)
    by_channel = interpolation(states.shape[3], dim).to(states.device)
    return torch.einsum("gh,bhtd,cd->bgtc", by_head, states.float(), by_channel)
