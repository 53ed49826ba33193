"""What attention reads from a cache, and how far apart two caches are by that measure.

A receiver never looks at keys and values, only at the weighted sums that its queries make of them. Over model pairs the
likeness of these sums goes along with the answers (r = +0.57), that of the numbers themselves does not
(arXiv:2608.03893). Shapes as in `kvferry.kv`: `queries` counts query heads, a multiple of `heads` (GQA).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import ShapeMismatch
from kvferry.kv import LayerGeometry


@dataclass(frozen=True)
class Scores:
    """How one layer turns q·k into the argument of its softmax: `cap(scale * q·k)`.

    `soft_cap` bounds scores to (-cap, cap) by cap * tanh(score / cap) (Gemma 2). `sinks` are further arguments of the
    softmax, one for each query head, that carry no value (gpt-oss).
    """

    scale: float
    soft_cap: float | None = None
    sinks: Float[Tensor, " queries"] | None = None


def attention_logits(
    queries: Float[Tensor, "batch queries new dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    scores: Scores,
) -> Float[Tensor, "batch queries new tokens"]:
    """Arguments of the softmax, in fp32 or finer, without sinks. Raises `ShapeMismatch`."""
    n_heads, exact = keys.shape[1], torch.promote_types(queries.dtype, torch.float32)
    if queries.shape[1] % n_heads:
        what = f"{queries.shape[1]} query heads on {n_heads} key heads"
        raise ShapeMismatch(what, cure="Give queries and keys of one layer")
    shared = queries.to(exact).unflatten(1, (n_heads, -1))
    logits = torch.einsum("bhgnd,bhtd->bhgnt", shared, keys.to(exact)).flatten(1, 2) * scores.scale
    return logits if scores.soft_cap is None else scores.soft_cap * torch.tanh(logits / scores.soft_cap)


def softmax_seen(
    logits: Float[Tensor, "batch queries new tokens"],
    visible: Bool[Tensor, "batch new tokens"],
    sinks: Float[Tensor, " queries"] | None,
) -> Float[Tensor, "batch queries new tokens"]:
    """Weights of the visible slots, beside a sink where there is one; all zero for a query that sees nothing."""
    n_tokens = logits.shape[-1]
    if sinks is not None:
        column = sinks.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits, visible = (
            torch.cat([logits, column], -1),
            torch.nn.functional.pad(visible, (0, 1), value=True),
        )
    hidden = ~visible.unsqueeze(1)
    # The lowest finite number, not -inf: the gradient of a row that sees nothing must not be NaN.
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)[..., :n_tokens]


def attention_outputs(
    queries: Float[Tensor, "batch queries new dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens value_dim"],
    visible: Bool[Tensor, "batch new tokens"],
    scores: Scores | float,
) -> Float[Tensor, "batch queries new value_dim"]:
    """softmax(scale * qk) v over the visible slots, by head; differentiable. A number for `scores` is the scale.

    Queries and keys are in one key space, and rotated unless the model has no rotation: content keys of several
    positions say nothing about one another. Raises `ShapeMismatch`.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> attention_outputs(one, one, 3 * one, torch.ones(1, 1, 1, dtype=torch.bool), 1.0).item()
    3.0
    """
    how = scores if isinstance(scores, Scores) else Scores(float(scores))
    weights = softmax_seen(attention_logits(queries, keys, how), visible, how.sinks)
    shared = weights.unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bhgnt,bhtd->bhgnd", shared, values.to(weights.dtype)).flatten(1, 2)


def relative_error(
    got: Float[Tensor, "batch queries new value_dim"],
    want: Float[Tensor, "batch queries new value_dim"],
    mask: Bool[Tensor, "batch new"],
) -> Float[Tensor, " queries"]:
    """By query head, ||got - want|| / ||want|| over the queries in `mask`: 0 is equal, 1 what zeros would give."""
    held = mask[:, None, :, None]
    error, size = (
        (part * held).transpose(0, 1).flatten(1).norm(dim=-1)
        for part in (got.float() - want.float(), want.float())
    )
    return error / size.clamp(min=torch.finfo(size.dtype).tiny)


def cosine(
    got: Float[Tensor, "batch queries new value_dim"],
    want: Float[Tensor, "batch queries new value_dim"],
    mask: Bool[Tensor, "batch new"],
) -> Float[Tensor, " queries"]:
    """By query head, the mean cosine between what the queries in `mask` read; 0 where nothing is read."""
    each = torch.nn.functional.cosine_similarity(got.float(), want.float(), dim=-1) * mask.unsqueeze(1)
    return each.sum((0, 2)) / mask.sum().clamp(min=1)


def visible_slots(
    layer: LayerGeometry,
    present: Bool[Tensor, "batch tokens"],
    positions: Int[Tensor, "batch tokens"],
    query_positions: Int[Tensor, "batch new"],
) -> Bool[Tensor, "batch new tokens"]:
    """Which slots each query of a layer sees: those present, not after it, and inside the layer's window."""
    query, key = query_positions.unsqueeze(-1), positions.unsqueeze(-2)
    seen = (key <= query) & present.unsqueeze(-2)
    if layer.window is None:
        return seen
    near = key // layer.window == query // layer.window if layer.chunked else query - key < layer.window
    return seen & near
