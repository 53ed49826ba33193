"""Text to token ids with byte spans: the only place that calls a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvferry.kv import Role, Spans


@dataclass(frozen=True)
class Tokens:
    """A left-padded batch of token ids; `mask` is False on padding."""

    ids: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    spans: tuple[Spans, ...]

    def row(self, index: int) -> "Row":
        """One sequence without its padding."""
        mask = self.mask[index]
        return self.ids[index][mask].tolist(), self.spans[index].take(mask.cpu().numpy())

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        return self.mask.sum(-1)


Row = tuple[list[int], Spans]
"""One sequence without padding."""


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], role: Role = Role.TEXT) -> Tokens:
    """Tokenise texts that stand in the middle of a prompt: no special tokens, no dummy space in front."""
    return pad(encode_rows(tokenizer, texts, [role] * len(texts)))


def encode_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], roles: Sequence[Role]) -> list[Row]:
    """`encode` without padding, each text in its own role."""
    if not texts:
        return []
    dummy = _adds_dummy_space(tokenizer)
    # The dummy space then stands for the text's own.
    spaces = [int(dummy and text.startswith(" ") and len(text) > 1) for text in texts]
    found = tokenizer(
        [text[space:] for text, space in zip(texts, spaces, strict=True)],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # length is our business, and an error of ours
    )
    rows = zip(texts, roles, found["input_ids"], found["offset_mapping"], spaces, strict=True)
    return [
        _row(tokenizer, text, role, list(ids), _moved(tokenizer, ids, offsets) if space else offsets)
        for text, role, ids, offsets, space in rows
    ]


def pad(rows: Sequence[Row]) -> Tokens:
    """Left-pad rows of ids and spans to one length (padding id 0, role PAD)."""
    width = max((len(ids) for ids, _ in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (numbers, _) in enumerate(rows):
        if numbers:
            ids[row, -len(numbers) :] = torch.tensor(numbers)
            mask[row, -len(numbers) :] = True
    return Tokens(ids, mask, tuple(spans.widen(width) for _, spans in rows))


def join(*parts: Tokens) -> Tokens:
    """Concatenate row by row, padding moved to the left again."""
    return pad([join_rows([part.row(row) for part in parts]) for row in range(parts[0].ids.shape[0])])


def join_rows(rows: Sequence[Row]) -> Row:
    """One sequence after the other."""
    spans = [spans for _, spans in rows]
    joined = Spans(
        np.concatenate([part.part for part in spans]),
        np.concatenate([part.start for part in spans]),
        np.concatenate([part.end for part in spans]),
        np.concatenate([part.role for part in spans]),
    )
    return [number for ids, _ in rows for number in ids], joined


def plain_spans(n_tokens: int, role: Role) -> Spans:
    """Spans of tokens that stand for no text of the context."""
    zeros = np.zeros(n_tokens, np.int32)
    return Spans(zeros, zeros.copy(), zeros.copy(), np.full(n_tokens, role, np.uint8))


def _row(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    role: Role,
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
) -> Row:
    if _starts_with_dummy_space(tokenizer, text, ids):
        ids, offsets = ids[1:], offsets[1:]
    start, end = byte_ranges(text, offsets)
    return ids, Spans(np.zeros(len(ids), np.int32), start, end, np.full(len(ids), role, np.uint8))


def _adds_dummy_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the normaliser puts a "▁" before every text (SentencePiece style)."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])  # type: ignore[index]
    return bool(first) and str(first[0]).startswith("▁")


def _moved(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Offsets of a text that was tokenised without its first space, which belongs to the first token."""
    if not ids:
        return []
    end = 1 if tokenizer.convert_ids_to_tokens(ids[0]) == "▁" else offsets[0][1] + 1
    return [(0, end), *((first + 1, last + 1) for first, last in offsets[1:])]


def _starts_with_dummy_space(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> bool:
    """A lone "▁" that the normaliser put before a text without leading space."""
    return bool(ids) and not text.startswith((" ", "▁")) and tokenizer.convert_ids_to_tokens(ids[0]) == "▁"


def byte_ranges(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Character offsets to UTF-8 byte ranges that tile what the tokens cover.

    Tokens may share a character (byte-level pieces of an emoji, say) and then report overlapping offsets; its bytes are
    dealt out to them in order, so that no byte is lost and none is counted twice.

    >>> [part.tolist() for part in byte_ranges("aé", [(0, 1), (1, 2), (1, 2)])]
    [[0, 1, 2], [1, 2, 3]]
    """
    edges = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])]).astype(np.int32)
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    start, end = edges[first], edges[last]
    shared = np.flatnonzero(end[:-1] > start[1:])
    for char in np.unique(first[shared + 1]):
        borders = shared[first[shared + 1] == char]
        cuts = np.linspace(edges[char], edges[char + 1], len(borders) + 2).round()[1:-1]
        end[borders] = start[borders + 1] = cuts.astype(np.int32)
    return start, end
