"""Training texts as token batches, in which the tokens worth learning are marked.

Facts are drawn at random, so a model can learn nothing from most of a context; the answers are what it must get right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kvferry.models.zoo.recipes import Stage
from kvferry.models.zoo.tokenizers import SPECIALS, special_ids
from kvferry.models.zoo.words import GOODS, NAMES, TOWNS
from kvferry.models.zoo.worlds import Document, make_document

Row = tuple[list[int], list[bool]]  # tokens, and which of them are to be learned

_WORDS = NAMES + GOODS + TOWNS
_POOL = 512  # rows that are sorted by length before they are cut into batches


@dataclass(frozen=True)
class Batch:
    """`ids [rows, tokens]`, padded on the right; `learned` marks answers, `real` what is no padding."""

    ids: Tensor
    learned: Tensor
    real: Tensor


def batches(stage: Stage, tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Endless batches of about `stage.batch_tokens` tokens each, rows of like length together."""
    rng = Random(seed)
    while True:
        rows = sorted((_row(stage, tokenizer, rng) for _ in range(_POOL)), key=lambda row: len(row[0]))
        parts = list(_cut(rows, stage.batch_tokens))
        rng.shuffle(parts)
        yield from map(_batch, parts)


def _cut(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        if part and (len(part) + 1) * len(row[0]) > batch_tokens:
            yield part
            part = []
        part.append(row)


def _row(stage: Stage, tokenizer: Tokenizer, rng: Random) -> Row:
    if rng.random() < stage.copies:
        return _copy_row(stage, tokenizer, rng)
    while True:
        row = _document_row(_document(stage, rng), tokenizer)
        if len(row[0]) <= stage.max_tokens:
            return row


def _document(stage: Stage, rng: Random) -> Document:
    kind = rng.choices(list(stage.kinds), list(stage.kinds.values()))[0]
    n_facts = rng.randint(*stage.facts)
    return make_document(
        rng.getrandbits(63),
        kind=kind,
        n_facts=n_facts + (kind == "two_hop" and n_facts % 2),
        n_fillers=int(stage.max_fillers * rng.random() ** 3),
        n_questions=stage.questions,
    )


def _document_row(document: Document, tokenizer: Tokenizer) -> Row:
    _, bos, eos = special_ids(tokenizer)
    ids, learned = [bos], [False]
    for text, is_answer in document.pieces():
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        learned += [is_answer] * len(piece)
    return [*ids, eos], [*learned, False]


def _copy_row(stage: Stage, tokenizer: Tokenizer, rng: Random) -> Row:
    """Random tokens or words, then the same again or backwards: what teaches a model to look back."""
    n = rng.randint(8, stage.max_copy)
    if stage.copied_words and rng.random() < stage.copied_words:
        words = rng.choices(_WORDS, k=n // 4)
        parts = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in words]
    else:
        parts = [[i] for i in rng.choices(range(len(SPECIALS), tokenizer.get_vocab_size()), k=n)]
    again = parts[::-1] if stage.reversed_copies and rng.random() < stage.reversed_copies else parts
    _, bos, _ = special_ids(tokenizer)
    half = list(chain.from_iterable(parts))
    return [bos, *half, *chain.from_iterable(again)], [False] * (len(half) + 1) + [True] * len(half)


def _batch(rows: list[Row]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    learned = torch.tensor([marks + [False] * (width - len(marks)) for _, marks in rows])
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    return Batch(ids, learned, torch.arange(width) < lengths[:, None])
