"""How well the receiver goes on after a mapped cache: cross-entropy on the scored pieces of an example."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from kvferry.fuse.layout import relay_layout
from kvferry.kv import KV, Role
from kvferry.models.load import Model
from kvferry.models.state import empty, inject, read
from kvferry.models.tokens import Tokens, encode, join
from kvferry.train.examples import Example


@dataclass(frozen=True)
class Continuations:
    """Tokens after the contexts, and which of them are scored."""

    tokens: Tokens
    scored: Bool[Tensor, "batch tokens"]


@dataclass(frozen=True)
class Scores:
    """Summed cross-entropy in nats, scored tokens, and pieces of which every token was the likeliest."""

    nats: Float[Tensor, ""]
    n_tokens: int
    n_pieces: int
    n_right: int

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Nats per scored token."""
        return self.nats / max(self.n_tokens, 1)


def continuations(model: Model, examples: Sequence[Example]) -> Continuations:
    """Tokenise piece by piece, so that a scored piece begins at a token border. Role TEXT marks scored tokens."""
    rows = [_row(model, example) for example in examples]
    widest = max(row.ids.shape[1] for row in rows)
    tokens = Tokens(
        torch.cat([functional.pad(row.ids, (widest - row.ids.shape[1], 0)) for row in rows]),
        torch.cat([functional.pad(row.mask, (widest - row.mask.shape[1], 0)) for row in rows]),
        tuple(row.spans[0].widen(widest) for row in rows),
    )
    scored = torch.tensor([[role == Role.TEXT for role in spans.role] for spans in tokens.spans])
    return Continuations(tokens, scored)


def answer_scores(receiver: Model, kv: KV, after: Continuations, stride: float) -> Scores:
    """Let the receiver predict the continuations from an aligned cache. Differentiable in the cache."""
    head = receiver.heads(kv.n_batch)
    layout = relay_layout(kv, head.ids.shape[1], stride)
    length = int(layout.next_position.max()) + after.tokens.ids.shape[1]
    state = empty(receiver, kv.n_batch, call_length=length)
    if head.ids.shape[1]:
        read(state, head)
    inject(state, kv, layout.positions, layout.next_position)
    logits = read(state, after.tokens, keep=0)
    return _score(logits[:, :-1], after.tokens.ids[:, 1:].to(kv.device), after.scored[:, 1:].to(kv.device))


def _row(model: Model, example: Example) -> Tokens:
    roles = (Role.TEMPLATE, Role.TEXT)
    return join(*(encode(model.tokenizer, [text], roles[scored]) for text, scored in example.pieces))


def _score(
    logits: Float[Tensor, "batch tokens vocab"], ids: Int[Tensor, "batch tokens"], scored: Bool[Tensor, "batch tokens"]
) -> Scores:
    nats = functional.cross_entropy(logits[scored].float(), ids[scored], reduction="sum")
    wrong = (logits.detach().argmax(-1) != ids) & scored
    starts = scored & ~functional.pad(scored, (1, 0))[:, :-1]
    piece = (starts.cumsum(-1) - 1).clamp(min=0)
    n_wrong = torch.zeros_like(piece).scatter_add(-1, piece, wrong.long())
    n_pieces = int(starts.sum())
    return Scores(nats, int(scored.sum()), n_pieces, n_pieces - int((n_wrong > 0).sum()))
