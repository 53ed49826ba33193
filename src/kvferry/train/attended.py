"""What a model looked at while it read some texts: what indexers learn from, and are measured by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.kv import KV, Evidence
from kvferry.metrics.attention import Scores, attention_logits, softmax_seen, visible_slots
from kvferry.models.capture import capture_rotated
from kvferry.models.load import Model
from kvferry.models.tokens import Tokens, pad
from kvferry.rope import strip
from kvferry.train.paired import batches
from kvferry.train.sources.example import Source, Split


@dataclass(frozen=True)
class Attended:
    """A batch as a model read it, with rotated queries and keys: all that its attention is made of.

    Methods take the last `n_last` tokens of the batch as queries.
    """

    kv: KV
    evidence: Evidence
    scores: tuple[Scores, ...]

    @property
    def positions(self) -> Int[Tensor, "batch tokens"]:
        return self.kv.positions[0]

    @property
    def n_tokens(self) -> int:
        return self.kv.n_tokens

    def states(self, layer: int) -> Float[Tensor, "batch tokens hidden"]:
        """The input of a layer."""
        return self.evidence.hidden_states[layer]

    def content_keys(self, layer: int) -> Float[Tensor, "batch heads tokens dim"]:
        rotary = self.kv.geometry.layers[layer].rotary
        return strip(self.kv.layer(layer)[0], self.kv.positions, rotary, self.kv.call_length)

    def visible(self, layer: int, n_last: int) -> Bool[Tensor, "batch new tokens"]:
        """Which tokens each query sees; padding sees nothing."""
        present, asking = self.kv.present[layer], self.positions[:, -n_last:]
        seen = visible_slots(self.kv.geometry.layers[layer], present, self.positions, asking)
        return seen & present[:, -n_last:].unsqueeze(-1)

    def shares(self, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
        """Attention summed over query heads, over its own sum: 1 for each query that sees anything."""
        queries, how = self.evidence.queries_rotated[layer][:, :, -n_last:], self.scores[layer]
        logits = attention_logits(queries, self.kv.layer(layer)[0], how)
        mass = softmax_seen(logits, self.visible(layer, n_last), how.sinks).sum(1)
        return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def attend(model: Model, texts: Sequence[str], scores: tuple[Scores, ...], max_tokens: int) -> Attended:
    """Read texts, each up to `max_tokens` tokens and as far as the model has positions."""
    limit = min(max_tokens, model.geometry.max_positions or max_tokens)
    seen = capture_rotated(
        model, _first(model.contexts(list(texts)), limit), ("queries_rotated", "hidden_states")
    )
    return Attended(seen.kv, seen.evidence, scores)


def held_out(
    model: Model,
    source: Source,
    scores: tuple[Scores, ...],
    *,
    split: Split,
    n_texts: int,
    max_tokens: int,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[Attended]:
    """The first texts of a split, in batches."""
    texts = [example.context for example in islice(source.examples(split, seed), n_texts)]
    for batch in batches(texts, batch_size):
        yield attend(model, batch, scores, max_tokens)


def _first(tokens: Tokens, n: int) -> Tokens:
    if tokens.ids.shape[1] <= n:
        return tokens
    rows = [tokens.row(row) for row in range(len(tokens.ids))]
    return pad([(ids[:n], spans.take(np.arange(len(ids[:n])))) for ids, spans in rows])
