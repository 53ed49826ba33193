"""Sums of cache entries by the text of their tokens, streaming, for the table of tokens without context."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def _none() -> Float64[Tensor, "known width"]:
    return torch.zeros(0, 1, dtype=torch.float64)


PRIOR = 1.0
"""So many tokens of the mean of all stand behind each entry: a token seen once says little."""


@dataclass
class TokenMeans:
    """For each token text, in the order in which they came: how often, and the sums of both sides' entries, fp64."""

    index: dict[bytes, int] = field(default_factory=dict)
    counts: Float64[Tensor, "known 1"] = field(default_factory=_none)
    marks: Float64[Tensor, "known marks"] = field(default_factory=_none)
    entries: Float64[Tensor, "known out"] = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.index)

    def add(
        self,
        texts: Sequence[bytes],
        marks: Float[Tensor, "tokens marks"],
        entries: Float[Tensor, "tokens out"],
    ) -> None:
        """Add tokens: what they stand for, what the sender's first layer and the whole receiver hold of them."""
        found = [self.index.setdefault(text, len(self.index)) for text in texts]
        rows = torch.tensor(found, dtype=torch.long)  # of no text the type would be float
        self.counts = _grown(self.counts, torch.ones(len(rows), 1), rows, len(self))
        self.marks = _grown(self.marks, marks, rows, len(self))
        self.entries = _grown(self.entries, entries, rows, len(self))

    def entries_of(self, texts: Sequence[Sequence[bytes]]) -> Float[Tensor, "batch tokens out"]:
        """The mean entry of each token, drawn to the mean of all where it was seen rarely, or never."""
        total = self.entries.sum(0, keepdim=True) / self.counts.sum()
        means = torch.cat([(self.entries + PRIOR * total) / (self.counts + PRIOR), total]).float()
        return means[torch.tensor([[self.index.get(text, len(self)) for text in row] for row in texts])]


def _grown(held: Tensor, added: Tensor, rows: Tensor, n: int) -> Float64[Tensor, "known width"]:
    total = torch.zeros(n, added.shape[-1], dtype=torch.float64)
    if len(held):
        total[: len(held)] = held
    return total.index_add_(0, rows, added.double().cpu())
