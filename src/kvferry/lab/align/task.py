"""The task: nats per character of a continuation whose prefix comes as text, as a mapped cache, as both, or not at all.

Rule 1: the first suffix token is given and not scored, in every condition: behind a cache there is no hidden state that
could predict it.
Rule 2: what is sent ends where the tail begins if the tail comes as text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kvferry.kv import KV, Role
from kvferry.lab.align.passages import Pair, Passage
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.state import empty, read
from kvferry.models.tokens import Tokens, encode, encode_rows, join, join_rows, pad
from kvferry.train.examples import Split
from kvferry.train.route import Route

BATCH = 40
Nats = NDArray[np.float64]
"""Nats per character, passage by passage."""


@dataclass(frozen=True)
class Batch:
    """Passages, and what the sender holds of their prefixes: whole, or without the tail."""

    passages: tuple[Passage, ...]
    tails: tuple[str, ...]
    sent: KV

    @property
    def contexts(self) -> list[str]:
        """The texts that were read for `sent`."""
        pairs = zip(self.passages, self.tails, strict=True)
        return [passage.prefix[: len(passage.prefix) - len(tail)] for passage, tail in pairs]

    @property
    def suffixes(self) -> list[str]:
        return [passage.suffix for passage in self.passages]


def batches_of(pair: Pair, route: Route, split: Split, n: int, *, with_tail: bool) -> list[Batch]:
    """The first `n` passages of a split; `with_tail` keeps the last characters of each back, to come as text."""
    found = pair.passages(split, n)
    return [_batch(route, found[start : start + BATCH], with_tail) for start in range(0, len(found), BATCH)]


def after_cache(
    receiver: Model, batches: Sequence[Batch], arrive: Callable[[Batch], KV], stride: float
) -> Nats:
    """Nats per character behind what `arrive` makes of each batch, and the tail as text where there is one."""
    return np.concatenate([_after_cache(receiver, batch, arrive(batch), stride) for batch in batches])


def after_text(receiver: Model, passages: Sequence[Passage], given: Callable[[Passage], str]) -> Nats:
    """Nats per character behind text that the receiver reads itself."""
    found = [
        _after_text(receiver, passages[start : start + BATCH], given)
        for start in range(0, len(passages), BATCH)
    ]
    return np.concatenate(found)


def _batch(route: Route, passages: Sequence[Passage], with_tail: bool) -> Batch:
    ends = [passage.tail if with_tail else len(passage.prefix) for passage in passages]
    texts = [passage.prefix[:end] for passage, end in zip(passages, ends, strict=True)]
    tails = tuple(passage.prefix[end:] for passage, end in zip(passages, ends, strict=True))
    return Batch(tuple(passages), tails, route.sent(texts))


@torch.no_grad()
def _after_cache(receiver: Model, batch: Batch, arrived: KV, stride: float) -> Nats:
    tails = encode_rows(receiver.tokenizer, batch.tails, [Role.TEMPLATE] * len(batch.tails))
    suffixes = encode_rows(receiver.tokenizer, batch.suffixes, [Role.TEXT] * len(batch.tails))
    after = pad([join_rows(rows) for rows in zip(tails, suffixes, strict=True)])
    _, logits = take_over(receiver, arrived, stride, after, keep=0)
    return _score(logits, after, batch.passages)


@torch.no_grad()
def _after_text(receiver: Model, passages: Sequence[Passage], given: Callable[[Passage], str]) -> Nats:
    texts = encode(receiver.tokenizer, [given(passage) for passage in passages], Role.TEMPLATE)
    suffixes = encode(receiver.tokenizer, [passage.suffix for passage in passages])
    tokens = join(receiver.heads(len(passages)), texts, suffixes)
    logits = read(empty(receiver, len(passages)), tokens, keep=0)
    return _score(logits, tokens, passages)


def _score(logits: Float[Tensor, "batch tokens vocab"], tokens: Tokens, passages: Sequence[Passage]) -> Nats:
    ids = tokens.ids.to(logits.device)[:, 1:]
    nats = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    scored = _scored(tokens).to(logits.device)[:, 1:]
    n_chars = [_n_scored_chars(tokens, row, passage) for row, passage in enumerate(passages)]
    return (nats * scored).sum(-1).double().cpu().numpy() / np.array(n_chars)


def _scored(tokens: Tokens) -> Bool[Tensor, "batch tokens"]:
    """The suffix without its first token."""
    is_suffix = _is_suffix(tokens)
    return is_suffix & (is_suffix.cumsum(-1) > 1)


def _is_suffix(tokens: Tokens) -> Bool[Tensor, "batch tokens"]:
    return torch.from_numpy(np.stack([spans.role == Role.TEXT for spans in tokens.spans]))


def _n_scored_chars(tokens: Tokens, row: int, passage: Passage) -> int:
    """Texts of this bench are ASCII: a byte is a character."""
    first: Int[Tensor, ""] = _is_suffix(tokens)[row].long().argmax()
    return len(passage.suffix) - int(tokens.spans[row].end[int(first)])
