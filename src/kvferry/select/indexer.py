"""The lightning indexer: a small product of its own says which slots a query will look at, layer by layer.

DeepSeek-V3.2-Exp (DeepSeek-AI, 2025): query t scores slot s by I(t, s) = sum over j of w(t, j) * ReLU(q(t, j) . k(s)),
with few indexer heads j and one key that they share. Queries, weights and keys are linear in the layer's input, the
hidden state, for that is where the layer's own queries and keys come from. There q comes from a latent and keys are
kept in FP8; here nothing is narrowed, and the softmax of I is trained to be the layer's attention
(`kvferry.train.indexer_fit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from kvferry.errors import BadSpec, ShapeMismatch
from kvferry.kv import Geometry
from kvferry.rope import NO_ROTATION, RotarySpec, rotate
from kvferry.select.bound_folder import BoundFolder

MAX_WEIGHTS = 2**28
"""Of one layer's queries: a folder that announces more is refused before anything is allocated."""


def index_scores(
    queries: Float[Tensor, "batch index_heads new dim"],
    weights: Float[Tensor, "batch index_heads new"],
    keys: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch new tokens"]:
    """I(t, s) = sum over j of w(t, j) * ReLU(q(t, j) . k(s)).

    >>> query, key = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[3.0, 0.5], [-3.0, 0.5]]])
    >>> index_scores(query, torch.tensor([[[0.5]]]), key)
    tensor([[[2., 0.]]])
    """
    products = torch.einsum("bjnd,btd->bjnt", queries, keys).relu()
    return torch.einsum("bjn,bjnt->bnt", weights, products)


def turning(rotary: RotarySpec, dim: int) -> RotarySpec:
    """The rotation of half an indexer's channels, by the model's own frequencies: evenly chosen, or each several times.

    One key stands for all the layer's heads, so a frequency needs room for more than one head of the model.

    >>> of_model = RotarySpec("interleaved", dim=4, inv_freq=(1.0, 0.01))
    >>> turning(of_model, dim=4).inv_freq, turning(of_model, dim=16).inv_freq
    ((1.0,), (1.0, 1.0, 0.01, 0.01))
    """
    n_known, n_pairs = len(rotary.inv_freq), dim // 4
    if n_known == 0 or n_pairs == 0:
        return NO_ROTATION
    frequencies = tuple(rotary.inv_freq[pair * n_known // n_pairs] for pair in range(n_pairs))
    return RotarySpec("half", dim=2 * n_pairs, inv_freq=frequencies)


@dataclass(frozen=True)
class IndexerShape:
    """Width of the model's hidden states, indexer heads, and channels of each. Raises `BadSpec`."""

    hidden: int
    heads: int = 8
    dim: int = 64

    def __post_init__(self) -> None:
        n_weights = self.hidden * self.heads * self.dim
        if min(self.hidden, self.heads, self.dim) < 1 or n_weights > MAX_WEIGHTS:
            what = f"{self.heads} indexer heads of {self.dim} channels on hidden states of {self.hidden}"
            raise BadSpec(what, cure=f"Each is 1 or more, their product at most {MAX_WEIGHTS}")


class LayerIndexer(nn.Module):
    """The indexer of one layer."""

    def __init__(self, shape: IndexerShape, rotary: RotarySpec) -> None:
        super().__init__()
        self.shape, self.rotary = shape, turning(rotary, shape.dim)
        self.queries = nn.Linear(shape.hidden, shape.heads * shape.dim, bias=False)
        self.keys = nn.Linear(shape.hidden, shape.dim, bias=False)
        self.norm = nn.LayerNorm(shape.dim)
        self.weights = nn.Linear(shape.hidden, shape.heads)

    def forward(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        positions: Int[Tensor, "batch tokens"],
        n_last: int,
    ) -> Float[Tensor, "batch new tokens"]:
        """Scores of all tokens for the last `n_last` of them, before any mask. `positions` turn q and k."""
        shape, length = self.shape, (states.shape[-1],)
        if length != (shape.hidden,):
            what = f"hidden states of {length[0]} channels, {shape.hidden} were fitted"
            raise ShapeMismatch(what, cure="Give the inputs of the model's layers")
        seen = rms_norm(states.float(), length)
        asking = seen[:, -n_last:]
        queries = self.queries(asking).unflatten(-1, (shape.heads, shape.dim)).transpose(1, 2)
        weights = self.weights(asking).transpose(1, 2) * (shape.heads * shape.dim) ** -0.5
        keys = self.norm(self.keys(seen)).unsqueeze(1)
        turned = rotate(queries, positions[None, :, -n_last:], self.rotary)
        return index_scores(turned, weights, rotate(keys, positions[None], self.rotary).squeeze(1))


class Indexer(nn.Module):
    """The indexers of all layers of one model. Kept as a folder, see `INDEXERS`."""

    def __init__(self, geometry: Geometry, shape: IndexerShape) -> None:
        super().__init__()
        self.geometry, self.shape = geometry, shape
        self.layers = nn.ModuleList(LayerIndexer(shape, layer.rotary) for layer in geometry.layers)

    def forward(
        self,
        layer: int,
        states: Float[Tensor, "batch tokens hidden"],
        positions: Int[Tensor, "batch tokens"],
        n_last: int,
    ) -> Float[Tensor, "batch new tokens"]:
        """Scores of one layer, from its own input."""
        return self.layers[layer](states, positions, n_last)


def _built(geometry: Geometry, config: Mapping[str, Any]) -> Indexer:
    return Indexer(geometry, IndexerShape(config["hidden"], config["heads"], config["dim"]))


INDEXERS = BoundFolder("lightning", _built, "kvferry fit-indexer")
