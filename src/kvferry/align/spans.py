"""Which token of one model stands for which bytes of another's: overlap of byte spans, many to many.

Rule 1: text corresponds by bytes, never by decoding one token and encoding it again.
Rule 2: special tokens correspond to special ones and template tokens to template ones, the k-th to the k-th, counted
from the front in each section: before the text, and after each part of it. From the front, because a model's first
token takes most of the attention whatever it is called, so one model's BOS corresponds to the first special token of
a model that has none. Where one model has more of them, the rest corresponds to nothing.
Rule 3: text of no bytes (pieces of one normalised character) and patches correspond to those of exactly the same span,
the k-th to the k-th.
Rule 4: padding corresponds to nothing.

With equal tokenizers every token so corresponds to itself alone.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from kvferry.kv import Role, Spans

_PART = 1 << 32
"""Above every byte of a part, so that part and byte are one number."""


@dataclass(frozen=True)
class Matches:
    """Pairs of tokens, sorted by row and, within a row, as the columns stand in the text."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    n_bytes: NDArray[np.int64]


def shared_bytes(rows: Spans, columns: Spans) -> Matches:
    """All pairs of text tokens that share bytes."""
    (row, row_start, row_end), (column, start, end) = _in_text_order(rows), _in_text_order(columns)
    low = np.searchsorted(np.maximum.accumulate(end), row_start, side="right")
    n_near = np.clip(np.searchsorted(start, row_end, side="left") - low, 0, None)
    i = np.repeat(np.arange(len(row)), n_near)
    j = np.arange(len(i)) - np.repeat(n_near.cumsum() - n_near - low, n_near)
    common = np.minimum(row_end[i], end[j]) - np.maximum(row_start[i], start[j])
    found = np.flatnonzero(common > 0)
    found = found[np.argsort(row[i[found]], kind="stable")]
    return Matches(row[i[found]], column[j[found]], common[found])


def same_place(rows: Spans, columns: Spans) -> Matches:
    """All pairs of tokens that stand for no bytes of text and correspond by rules 2 and 3."""
    one, other = _places(rows), _places(columns)
    pairs = np.array([(index, other[place]) for place, index in one.items() if place in other], np.int64)
    pairs = pairs.reshape(-1, 2)
    return Matches(pairs[:, 0], pairs[:, 1], np.zeros(len(pairs), np.int64))


def overlap(sender: Spans, receiver: Spans) -> NDArray[np.float32]:
    """Weights `[sender tokens, receiver tokens]`: the share of a sender token's bytes that each receiver token covers.

    Rows of text tokens sum to one where the receiver covers the text; rows of other tokens are zero. With equal
    tokenizers this is the identity.
    """
    found = shared_bytes(sender, receiver)
    common = np.zeros((len(sender), len(receiver)), np.float32)
    common[found.rows, found.columns] = found.n_bytes
    total = common.sum(1, keepdims=True)
    return np.divide(common, total, out=np.zeros_like(common), where=total > 0)


def overlaps(
    sender: tuple[Spans, ...], receiver: tuple[Spans, ...]
) -> Float[Tensor, "batch sender receiver"]:
    """`overlap` for a padded batch."""
    return torch.stack(
        [torch.from_numpy(overlap(one, two)) for one, two in zip(sender, receiver, strict=True)]
    )


def _in_text_order(spans: Spans) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the text tokens as they stand in the text, and their first byte and the one after their last."""
    start, end = (spans.part * np.int64(_PART) + byte for byte in (spans.start, spans.end))
    text = np.flatnonzero(spans.role == Role.TEXT)
    text = text[np.lexsort((end[text], start[text]))]
    return text, start[text], end[text]


def _places(spans: Spans) -> dict[tuple[int, ...], int]:
    """Where each token stands that stands for no bytes of text; equal places correspond."""
    content = np.isin(spans.role, (Role.TEXT, Role.PATCH))
    last = np.maximum.accumulate(np.where(content, np.arange(len(spans)), -1))
    section = np.where(last < 0, 0, spans.part[last] + 1)
    empty_text = (spans.role == Role.TEXT) & (spans.start == spans.end)
    found: dict[tuple[int, ...], int] = {}
    seen: Counter[tuple[int, ...]] = Counter()
    for index in np.flatnonzero(empty_text | ~np.isin(spans.role, (Role.TEXT, Role.PAD))).tolist():
        span = (int(spans.part[index]), int(spans.start[index]), int(spans.end[index]))
        place = (int(spans.role[index]), *(span if content[index] else (int(section[index]),)))
        found[*place, seen[place]] = index
        seen[place] += 1
    return found
