"""What the suffix reads from the prefix: softmax(qK)V over the prefix alone, with the suffix's real queries."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.kv import KV
from kvferry.models.load import Model
from kvferry.rope import rotate

Reads = tuple[Float[Tensor, "batch queries suffix dim"], ...]
"""By layer."""


@torch.no_grad()
def read_prefix(model: Model, queries: Reads, kv: KV) -> Reads:
    """The reads of rotated queries that stand right behind a cache, in either key space."""
    return tuple(_read_layer(model, layer, queries[layer], kv) for layer in range(kv.geometry.n_layers))


def _read_layer(
    model: Model, layer: int, queries: Float[Tensor, "batch queries suffix dim"], kv: KV
) -> Float[Tensor, "batch queries suffix value_dim"]:
    keys, values = kv.layer(layer)
    if kv.space == "content":
        keys = rotate(keys, kv.positions, kv.geometry.layers[layer].rotary, kv.call_length)
    share = queries.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(share, 1) for part in (keys, values))
    scores = queries @ keys.transpose(-1, -2) * _scaling(model, layer)
    hidden = ~_visible(model, layer, kv.n_tokens, queries.shape[2])
    # A query whose window holds nothing of the prefix reads zero.
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ values


def _visible(model: Model, layer: int, n_prefix: int, n_suffix: int) -> Bool[Tensor, "suffix prefix"]:
    window = model.geometry.layers[layer].window
    distance = torch.arange(n_prefix, n_prefix + n_suffix).unsqueeze(-1) - torch.arange(n_prefix)
    return distance < window if window is not None else distance >= 0


def _scaling(model: Model, layer: int) -> float:
    """What the model multiplies scores by."""
    layers: Any = model.hf.get_decoder().layers  # transformers' modules are not typed
    return float(layers[layer].self_attn.scaling)
