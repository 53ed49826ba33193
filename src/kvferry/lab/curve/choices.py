"""Forced choice: which of an item's words the receiver finds likeliest, all behind one reading of the question.

Rule 1: words are compared by the likelihood of their tokens. Where the tokens of one begin those of another, each ends
with the newline that ends an answer, or the shorter word would win for being shorter.
Rule 2: a word's first token bounds its likelihood, so that words of several tokens are read only while they can still
win. Words of a single token need no reading at all.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import Role
from kvferry.lab.curve.marks import Marks
from kvferry.models.load import Model
from kvferry.models.state import State, read
from kvferry.models.tokens import encode_rows, pad, plain_spans
from kvferry.models.zoo.worlds import Item, continuation

Word = tuple[int, ...]


@cache
def words_of(model: Model, choices: tuple[str, ...]) -> tuple[Word, ...]:
    """The tokens of each choice, none of which begins another."""
    plain = _encoded(model, [continuation(choice).removesuffix("\n") for choice in choices])
    return plain if _free(plain) else _encoded(model, [continuation(choice) for choice in choices])


@torch.no_grad()
def choose(state: State, logits: Float[Tensor, "batch vocab"], items: Sequence[Item]) -> Marks:
    """Marks from where the model has read the questions; the state is left as it is."""
    words = [words_of(state.model, item.choices) for item in items]
    right = [item.choices.index(item.answer) for item in items]
    nats = nats_of(state, logits, words, right)
    best = np.array([int(row.argmin()) for row in nats])
    nll = np.array([row[index] for row, index in zip(nats, right, strict=True)])
    return Marks((best == np.array(right)).astype(float), np.ones(len(items)), nll)


def nats_of(
    state: State, logits: Float[Tensor, "batch vocab"], words: Sequence[Sequence[Word]], wanted: Sequence[int]
) -> list[np.ndarray]:
    """Nats of each row's words: exact for the likeliest and the wanted one, at least so many for the others."""
    first = -logits.double().log_softmax(-1).cpu().numpy()
    nats = [first[row, [word[0] for word in mine]] for row, mine in enumerate(words)]
    known = [np.array([len(word) == 1 for word in mine]) for mine in words]
    ahead = {row: index for row, index in enumerate(wanted) if not known[row][index]}
    while ahead:
        asked = [mine[ahead.get(row, wanted[row])] for row, mine in enumerate(words)]
        rest = _rest(state, asked)
        for row, index in ahead.items():
            nats[row][index] += rest[row]
            known[row][index] = True
        likeliest = [int(row.argmin()) for row in nats]
        ahead = {row: index for row, index in enumerate(likeliest) if not known[row][index]}
    return nats


def _rest(state: State, words: Sequence[Word]) -> list[float]:
    """Nats of the tokens of one word for each row, without its first."""
    fork = replace(state, cache=copy.deepcopy(state.cache))
    tokens = pad([(list(word), plain_spans(len(word), Role.TEXT)) for word in words])
    nats = -read(fork, tokens, keep=0).double().log_softmax(-1)
    ids = tokens.ids.to(nats.device)
    each = nats[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).cpu().numpy()
    return [float(row[len(row) - len(word) + 1 :].sum()) for row, word in zip(each, words, strict=True)]


def _encoded(model: Model, texts: Sequence[str]) -> tuple[Word, ...]:
    rows = encode_rows(model.tokenizer, texts, [Role.TEXT] * len(texts))
    return tuple(tuple(ids) for ids, _ in rows)


def _free(words: Sequence[Word]) -> bool:
    """Whether no word begins another; in order, one that did would stand right before it."""
    ordered = sorted(words)
    return all(b[: len(a)] != a for a, b in pairwise(ordered))
