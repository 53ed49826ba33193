"""What queries of the sender make of the tokens that it read: the ground of every score by attention.

Queries are those of the evidence or of the question, in content space; they and the keys are rotated to where they
stood, and what a query sees, how q·k is scaled and which sinks take their share are the layer's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvferry.errors import UsageError
from kvferry.kv import LayerGeometry
from kvferry.metrics.attention import Scores, attention_logits, softmax_seen, visible_slots
from kvferry.rope import rotate
from kvferry.select.sight import Sight


@dataclass(frozen=True)
class Posed:
    """Queries and keys of one layer as they met: rotated, and which token each query sees."""

    queries: Float[Tensor, "1 queries new dim"]
    keys: Float[Tensor, "1 heads tokens dim"]
    visible: Bool[Tensor, "1 new tokens"]
    scores: Scores


def pose(
    sight: Sight,
    layer: int,
    queries: Float[Tensor, "1 queries new dim"],
    positions: Int[Tensor, "axes 1 new"],
) -> Posed:
    """Content-space `queries` turned to `positions`, the keys read to theirs; `UsageError` without `Sight.scores`."""
    read, geometry = sight.read, sight.read.geometry.layers[layer]
    call_length = read.call_length
    if geometry.rotary.long is not None:
        call_length = max(call_length, int(positions.max()) + 1)
    keys = rotate(read.layer(layer)[0], read.positions, geometry.rotary, call_length)
    turned = rotate(queries, positions, geometry.rotary, call_length)
    visible = visible_slots(geometry, read.present[layer], read.positions[0], positions[0])
    return Posed(turned, keys, visible, scores_of_layer(sight, layer))


def pose_last(sight: Sight, layer: int, window: int) -> Posed:
    """The last `window` queries of what was read."""
    queries = recorded(sight.evidence.queries_content, "queries_content")[layer]
    return pose(sight, layer, queries[:, :, -window:], sight.read.positions[:, :, -window:])


@dataclass(frozen=True)
class Looked:
    """Softmax weights of some queries of one layer over the tokens that were read, and which of them each sees."""

    weights: Float[Tensor, "queries new tokens"]
    visible: Bool[Tensor, "new tokens"]

    def mean(self) -> Float[Tensor, " tokens"]:
        """The weight of each token, mean over query heads and over the queries that see it."""
        return self.weights.mean(0).sum(0) / self.visible.sum(0).clamp(min=1)


def looked(posed: Posed) -> Looked:
    logits = attention_logits(posed.queries, posed.keys, posed.scores)
    return Looked(softmax_seen(logits, posed.visible, posed.scores.sinks)[0], posed.visible[0])


def scores_of_layer(sight: Sight, layer: int) -> Scores:
    if not sight.scores:
        cure = "Make the sight with session.selecting.look, or hand in models.scores.scores_of(model)"
        raise UsageError("nothing says how this model scales its attention", cure=cure)
    return sight.scores[layer]


def recorded(evidence: tuple[Tensor, ...], need: str) -> tuple[Tensor, ...]:
    """The evidence of one kind, by layer; `UsageError` where capture did not record it."""
    if not evidence:
        raise UsageError(
            f"no {need} in the evidence", cure=f"Capture with needs=({need!r},), as the selector says"
        )
    return evidence


def received(sight: Sight, layer: int) -> Float[Tensor, "heads tokens"]:
    """Attention that each token received while the context was read, for each query that could see it."""
    mass = recorded(sight.evidence.attention_mass, "attention_mass")[layer][0]
    present, positions = sight.read.present[layer, 0], sight.read.positions[0, 0]
    return mass / n_seeing(sight.read.geometry.layers[layer], present, positions).clamp(min=1)


def n_seeing(
    layer: LayerGeometry, present: Bool[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
) -> Int[Tensor, " tokens"]:
    """How many of the queries of the tokens read see each of them: the column sums of `visible_slots`."""
    queries = positions[present].sort().values
    first = torch.searchsorted(queries, positions)
    if layer.window is None:
        return len(queries) - first
    end = (positions // layer.window + 1) * layer.window if layer.chunked else positions + layer.window
    return torch.searchsorted(queries, end) - first


def on_slots(
    sight: Sight, of_layer: Callable[[int], Float[Tensor, " tokens"]]
) -> Float[Tensor, "layers slots"]:
    """Numbers of the tokens of each layer, brought to the slots that carry them."""
    return torch.stack([sight.on_slots(of_layer(layer)) for layer in range(sight.read.geometry.n_layers)])


def pooled(sight: Sight, of_tokens: Float[Tensor, " tokens"], width: int) -> Float[Tensor, " tokens"]:
    """The mean over `width` (odd) neighbours, of those that a slot carries.

    A token that is not sent gives its neighbours nothing: an attention sink would lift them.
    """
    counted = sight.carried.any(0)
    both = torch.stack([of_tokens.masked_fill(~counted, 0.0), counted.to(of_tokens)])
    total, n = avg_pool1d(both, width, stride=1, padding=width // 2)
    return total / torch.where(n > 0, n, 1.0)
