"""The other naive map, as a control: a layer's numbers as one row, cut to the receiver's width."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kvferry.align.contract import Unfitted
from kvferry.align.layer_map import Depths, NearestDepth
from kvferry.align.layerwise import Layer, layer_by_layer
from kvferry.kv import KV, LayerGeometry


class Truncate(Unfitted):
    """The first numbers of a token's heads, side by side, of the layer nearest in depth; zeros only where none is left.

    Cut and padded rows are one map: a row is cut where the sender's is wider and padded where it is narrower, never
    both. What differs from `zero_pad` is what lies where: every layer gets something, and heads of other sizes are
    cut anew. It scores the same as any map without meaning; if it does not, something is wrong with the measure.
    """

    name: ClassVar[str] = "truncate"

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        receiver = self.contract.receiver
        sources = NearestDepth()(Depths(kv.geometry.n_layers, receiver.n_layers))

        def make(index: int, layer: LayerGeometry) -> Layer:
            keys, values = kv.layer(sources[index][0])
            return _cut(keys, layer.heads, layer.key_dim), _cut(values, layer.heads, layer.value_dim)

        return layer_by_layer(kv, receiver, make)


def _cut(
    states: Float[Tensor, "batch some_heads tokens some_dim"], heads: int, dim: int
) -> Float[Tensor, "batch heads tokens dim"]:
    row = states.float().transpose(1, 2).flatten(2)
    fitted = functional.pad(row, (0, heads * dim - row.shape[-1]))
    return fitted.unflatten(-1, (heads, dim)).transpose(1, 2)
