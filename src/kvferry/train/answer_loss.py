"""How well the receiver goes on after a mapped cache, on the scored pieces of an example.

Cross-entropy says how likely the very tokens are that come. The divergence says how far all that the receiver expects
is from what it would expect had it read the text itself: a map learns more from each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from kvferry.kv import KV, Role
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.state import empty, read
from kvferry.models.tokens import Tokens, encode_rows, join, join_rows, pad
from kvferry.train.examples import Example


@dataclass(frozen=True)
class Continuations:
    """Tokens after the contexts, and which of them are scored."""

    tokens: Tokens
    scored: Bool[Tensor, "batch tokens"]


@dataclass(frozen=True)
class Scores:
    """Summed cross-entropy in nats, scored tokens, and pieces of which every token was the likeliest.

    `by_example` are the nats per scored token of each example.
    """

    nats: Float[Tensor, ""]
    by_example: Float[Tensor, " batch"]
    n_tokens: int
    n_pieces: int
    n_right: int

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Nats per scored token."""
        return self.nats / max(self.n_tokens, 1)


@dataclass(frozen=True)
class Divergence:
    """Summed KL divergence in nats, and scored tokens."""

    nats: Float[Tensor, ""]
    n_tokens: int

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Nats per scored token."""
        return self.nats / max(self.n_tokens, 1)


def continuations(model: Model, examples: Sequence[Example]) -> Continuations:
    """Tokenise piece by piece, so that a scored piece begins at a token border. Role TEXT marks scored tokens."""
    pieces = [piece for example in examples for piece in example.pieces]
    roles = [Role.TEXT if scored else Role.TEMPLATE for _, scored in pieces]
    rows = iter(encode_rows(model.tokenizer, [text for text, _ in pieces], roles))
    tokens = pad([join_rows(list(islice(rows, len(example.pieces)))) for example in examples])
    return Continuations(
        tokens, torch.from_numpy(np.stack([spans.role == Role.TEXT for spans in tokens.spans]))
    )


def answer_scores(receiver: Model, kv: KV, after: Continuations, stride: float) -> Scores:
    """Let the receiver predict the continuations from an aligned cache. Differentiable in the cache."""
    _, logits = take_over(receiver, kv, stride, after.tokens, keep=0)
    return _score(logits[:, :-1], after.tokens.ids[:, 1:].to(kv.device), after.scored[:, 1:].to(kv.device))


@torch.no_grad()
def full_text_logits(
    receiver: Model, contexts: Sequence[str], after: Continuations
) -> Float[Tensor, "scored vocab"]:
    """What the receiver expects at the scored tokens where it has read the contexts itself. No gradient.

    Raises `ContextTooLong`.
    """
    tokens = join(receiver.contexts(list(contexts)), after.tokens)
    logits = read(empty(receiver, len(contexts)), tokens, keep=after.tokens.ids.shape[1])
    return _at_scored(logits, after)


def full_text_kl(
    receiver: Model, kv: KV, after: Continuations, stride: float, own: Float[Tensor, "scored vocab"]
) -> Divergence:
    """KL(own || behind the mapped cache) at the scored tokens. Differentiable in the cache.

    `own` are `full_text_logits`, and may be kept from one epoch to the next: the receiver does not change.
    """
    _, logits = take_over(receiver, kv, stride, after.tokens, keep=0)
    got, want = (part.float().log_softmax(-1) for part in (_at_scored(logits, after), own.detach()))
    nats = functional.kl_div(got, want, reduction="sum", log_target=True)
    return Divergence(nats, int(after.scored[:, 1:].sum()))


def _at_scored(
    logits: Float[Tensor, "batch tokens vocab"], after: Continuations
) -> Float[Tensor, "scored vocab"]:
    """Those that predict the scored tokens: of the token before each."""
    return logits[:, :-1][after.scored[:, 1:].to(logits.device)]


def _score(
    logits: Float[Tensor, "batch tokens vocab"],
    ids: Int[Tensor, "batch tokens"],
    scored: Bool[Tensor, "batch tokens"],
) -> Scores:
    each = torch.zeros_like(scored, dtype=torch.float32)
    each[scored] = functional.cross_entropy(logits[scored].float(), ids[scored], reduction="none")
    by_example = each.detach().sum(-1) / scored.sum(-1).clamp(min=1)
    wrong = (logits.detach().argmax(-1) != ids) & scored
    starts = scored & ~functional.pad(scored, (1, 0))[:, :-1]
    piece = (starts.cumsum(-1) - 1).clamp(min=0)
    n_wrong = torch.zeros_like(piece).scatter_add(-1, piece, wrong.long())
    n_pieces = int(starts.sum())
    return Scores(each.sum(), by_example, int(scored.sum()), n_pieces, n_pieces - int((n_wrong > 0).sum()))
