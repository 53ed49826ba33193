"""All layers of a cache as one: what a reader of several layers takes as input.

The result is no cache: a layer of the receiver that is made from it depends on every layer of the sender.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import ShapeMismatch, UnknownName, UsageError
from kvferry.kv import KV

AGGREGATIONS = ("concat", "mean", "weighted")
Rows = tuple[Float[Tensor, "batch tokens key_features"], Float[Tensor, "batch tokens value_features"]]
"""Keys and values of each token, heads side by side."""


def concat(kv: KV, layers: Sequence[int] | None = None) -> Rows:
    """The layers side by side, first layer first, in either key space. What a layer does not hold is zero."""
    chosen = _chosen(kv, layers)
    keys, values = zip(*(_rows(kv, layer) for layer in chosen), strict=True)
    return torch.cat(keys, -1), torch.cat(values, -1)


def weighted(kv: KV, weights: Float[Tensor, " chosen"], layers: Sequence[int] | None = None) -> Rows:
    """The weighted mean of layers of equal shape, each token's over the layers that hold it; no weight is negative.

    Raises `WrongKeySpace` for rotated keys, whose layers may rotate differently, and `ShapeMismatch` for layers of
    different heads or dims.
    """
    kv.require_space("content")
    chosen = _chosen(kv, layers)
    shapes = {(g.heads, g.key_dim, g.value_dim) for g in (kv.geometry.layers[layer] for layer in chosen)}
    if len(shapes) > 1:
        raise ShapeMismatch(f"layers of shapes {sorted(shapes)} have no mean", cure="Aggregate with concat")
    if len(weights) != len(chosen):
        raise ShapeMismatch(
            f"{len(weights)} weights for {len(chosen)} layers", cure="Give one for each layer"
        )
    shares = weights[:, None, None] * kv.present[chosen]
    shares = (shares / shares.sum(0).clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    keys, values = (torch.stack(part) for part in zip(*(_rows(kv, layer) for layer in chosen), strict=True))
    return (shares * keys).sum(0), (shares * values).sum(0)


def mean(kv: KV, layers: Sequence[int] | None = None) -> Rows:
    """The mean of layers of equal shape; as `weighted` with equal weights."""
    return weighted(kv, torch.ones(len(_chosen(kv, layers)), device=kv.device), layers)


class DynamicKVExtractor(nn.Module):
    """Takes a cache's layers as one, its dims as they are in the cache and not as a configuration says.

    `layers` chooses some of `n_layers`; all of them by default. With `weighted`, weights are learned: the softmax of
    `logits`. Where this name comes from, only concatenation exists, the choice of layers is not obeyed, and
    values are left out.
    """

    def __init__(
        self, n_layers: int, aggregation: str = "concat", layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise UnknownName("aggregation", aggregation, AGGREGATIONS)
        self.aggregation = aggregation
        self.layers = list(range(n_layers) if layers is None else layers)
        self.logits = nn.Parameter(torch.zeros(len(self.layers))) if aggregation == "weighted" else None

    def extract_kv(self, kv: KV) -> Rows:
        """Keys and values of the cache, aggregated. Raises as the functions of this module do."""
        if self.logits is not None:
            return weighted(kv, self.logits.softmax(0), self.layers)
        return concat(kv, self.layers) if self.aggregation == "concat" else mean(kv, self.layers)

    forward = extract_kv


def _chosen(kv: KV, layers: Sequence[int] | None) -> list[int]:
    chosen = list(range(kv.geometry.n_layers) if layers is None else layers)
    if not chosen or not {*chosen} <= {*range(kv.geometry.n_layers)}:
        raise UsageError(f"layers {chosen}", cure=f"Choose some of 0 to {kv.geometry.n_layers - 1}")
    return chosen


def _rows(kv: KV, layer: int) -> Rows:
    held = kv.present[layer].unsqueeze(-1)
    keys, values = (states.float().transpose(1, 2).flatten(2) for states in kv.layer(layer))
    return torch.where(held, keys, 0.0), torch.where(held, values, 0.0)
