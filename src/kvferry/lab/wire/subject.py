"""A model, the caches of its messages in both key spaces, and what it says after them when nothing is coded."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.kv import KV, Role
from kvferry.lab.wire.attention import Reads, read_prefix
from kvferry.lab.wire.texts import passages
from kvferry.models.capture import capture, capture_rotated
from kvferry.models.load import Model
from kvferry.models.state import empty, inject, read_at
from kvferry.models.tokens import Tokens, pad, plain_spans

N_SUFFIX = 64
"""Tokens that are scored after the prefix, and, after as many uncoded ones, once more."""


@dataclass(frozen=True)
class Subject:
    """Caches of `tokens` tokens and their continuation. `targets[i]` is the token that comes after `after[i]`."""

    model: Model
    content: KV
    rotated: KV
    after: Tokens
    targets: Int[Tensor, "batch after"]
    clean: Float[Tensor, "batch after vocab"]
    """Log-probabilities with the clean cache."""
    queries: Reads
    """Rotated queries of the suffix."""
    reads: Reads
    """What they read from the clean prefix."""

    @property
    def tokens(self) -> int:
        return self.content.n_tokens

    @property
    def n_messages(self) -> int:
        return self.content.n_batch

    @property
    def n_elements(self) -> int:
        """Numbers in all caches together."""
        return self.n_messages * self.tokens * self.content.geometry.floats_per_token


def fits(model: Model, tokens: int) -> bool:
    """Whether prefix and suffix have room in the model's context."""
    limit = model.geometry.max_positions
    return limit is None or tokens + N_SUFFIX <= limit


def make_subject(model: Model, tokens: int, n_messages: int = 32) -> Subject:
    """Read `n_messages` held-out texts. The gap is left out where the model's context has no room for it."""
    limit = model.geometry.max_positions
    n_after = 2 * N_SUFFIX if limit is None or tokens + 2 * N_SUFFIX <= limit else N_SUFFIX
    ids = passages(model, n_messages, prefix=tokens, after=n_after + 1)
    return subject_of(model, ids, tokens)


@torch.no_grad()
def subject_of(model: Model, ids: Int[Tensor, "batch tokens"], tokens: int) -> Subject:
    """The same from passages of a prefix of `tokens`, what follows, and one last token to predict."""
    prefix, after = _tokens(ids[:, :tokens]), _tokens(ids[:, tokens:-1])
    content, rotated = capture(model, prefix).kv, capture_rotated(model, prefix).kv
    suffix = slice(tokens, tokens + N_SUFFIX)
    evidence = capture_rotated(model, _tokens(ids[:, : suffix.stop]), ["queries_rotated"]).evidence
    queries = tuple(layer[:, :, suffix] for layer in evidence.queries_rotated)
    clean = log_probs(model, rotated, after)
    reads = read_prefix(model, queries, rotated)
    return Subject(model, content, rotated, after, ids[:, tokens + 1 :], clean, queries, reads)


@torch.no_grad()
def log_probs(model: Model, kv: KV, after: Tokens) -> Float[Tensor, "batch after vocab"]:
    """What the model says at each token that it reads behind the cache."""
    n_tokens, n_after = kv.n_tokens, after.ids.shape[1]
    state = empty(model, kv.n_batch, call_length=n_tokens + n_after)
    inject(state, kv, kv.positions[0], torch.full((kv.n_batch,), n_tokens))
    positions = torch.arange(n_tokens, n_tokens + n_after).expand(kv.n_batch, -1)
    return read_at(state, after, positions, keep=0).float().log_softmax(-1)


def _tokens(ids: Int[Tensor, "batch tokens"]) -> Tokens:
    return pad([(row.tolist(), plain_spans(len(row), Role.TEXT)) for row in ids])
