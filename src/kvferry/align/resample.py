"""A cache of other tokens, each a mean of tokens that were there."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import KV, Group


def resample(kv: KV, weights: Float[Tensor, "batch slots tokens"]) -> KV:
    """The weighted means of a content-space cache's tokens; weights are scaled to sum to one over those present.

    A mean of rotated keys of different positions means nothing, hence content space alone. A slot without weight is
    absent; position and span are those of the heaviest token. A token that any layer lacks is lost.
    """
    kv.require_space("content")
    weights = weights * kv.present.all(0).unsqueeze(1)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    heaviest = weights.argmax(-1)
    rows = heaviest.cpu().numpy()
    return replace(
        kv,
        groups=tuple(Group(g.layers, _mean(weights, g.keys), _mean(weights, g.values)) for g in kv.groups),
        present=(total > 0).squeeze(-1).expand(kv.geometry.n_layers, -1, -1),
        positions=kv.positions.gather(-1, heaviest.expand(len(kv.positions), -1, -1)),
        spans=tuple(spans.take(row) for spans, row in zip(kv.spans, rows, strict=True)),
    )


def _mean(weights: Tensor, states: Tensor) -> Tensor:
    return torch.einsum("bst,lbhtd->lbhsd", weights, states.float())
