"""Items that a receiver is marked on, behind a cache or behind text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvferry.errors import UsageError
from kvferry.kv import KV
from kvferry.lab.align.passages import Pair, Passage, pair_of
from kvferry.lab.align.task import Batch, after_cache, after_text
from kvferry.lab.curve.choices import choose
from kvferry.lab.curve.marks import Marks, Numbers
from kvferry.lab.curve.task import Split, Task, questions_of
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.state import empty, read
from kvferry.models.tokens import join
from kvferry.models.zoo.worlds import Item
from kvferry.session.reading import question_tokens

BATCH = 64


@dataclass(frozen=True)
class Recall:
    """Questions about worlds."""

    receiver: Model
    items: tuple[Item, ...]

    @property
    def contexts(self) -> list[str]:
        return [item.context for item in self.items]

    @property
    def questions(self) -> list[str]:
        return questions_of(self.items)

    @torch.no_grad()
    def behind(self, kv: KV, stride: float, rows: slice) -> Marks:
        items = self.items[rows]
        state, logits = take_over(
            self.receiver, kv, stride, question_tokens(self.receiver, kv.spans, questions_of(items))
        )
        return choose(state, logits[:, -1], items)

    @torch.no_grad()
    def told(self, texts: Sequence[str], rows: slice) -> Marks:
        items = self.items[rows]
        asked = question_tokens(self.receiver, texts, questions_of(items))
        state = empty(self.receiver, len(items))
        logits = read(state, join(self.receiver.contexts(list(texts)), asked))
        return choose(state, logits[:, -1], items)


@dataclass(frozen=True)
class Stories:
    """Passages whose second half is predicted."""

    receiver: Model
    passages: tuple[Passage, ...]

    @property
    def contexts(self) -> list[str]:
        return [passage.prefix for passage in self.passages]

    @property
    def questions(self) -> None:
        return None

    def behind(self, kv: KV, stride: float, rows: slice) -> Marks:
        here = self.passages[rows]
        batch = Batch(here, ("",) * len(here), kv)
        return self._marked(after_cache(self.receiver, [batch], lambda one: one.sent, stride), rows)

    def told(self, texts: Sequence[str], rows: slice) -> Marks:
        given = dict(zip(self.passages[rows], texts, strict=True))
        return self._marked(after_text(self.receiver, self.passages[rows], given.__getitem__), rows)

    def _marked(self, nats: Numbers, rows: slice) -> Marks:
        nothing, whole = self._edges
        return Marks(nothing[rows] - nats, nothing[rows] - whole[rows], nats)

    @cached_property
    def _edges(self) -> tuple[Numbers, Numbers]:
        """With no prefix, and with all of it as text."""
        nothing = after_text(self.receiver, self.passages, lambda passage: "")
        return nothing, after_text(self.receiver, self.passages, lambda passage: passage.prefix)


Exam = Recall | Stories
"""What is read, what is asked, and how a slice of the items is marked: behind caches, or told as text."""


def exam_of(task: Task, sender: Model, receiver: Model, n: int, seed: int, split: Split) -> Exam:
    """The items of a seed; `UsageError` where there are not so many stories."""
    if task.recalls:
        return Recall(receiver, tuple(task.items(n, seed, split)))
    return Stories(receiver, passages_of(pair_of(sender, receiver), n, seed, split))


def passages_of(pair: Pair, n: int, seed: int, split: Split) -> tuple[Passage, ...]:
    """Each seed has passages of its own."""
    found = pair.passages(split, (seed + 1) * n)
    if len(found) < (seed + 1) * n:
        cure = f"Ask for fewer --items or --seeds: the {split} split has {len(found)} passages"
        raise UsageError(f"{seed + 1} seeds of {n} passages", cure=cure)
    return tuple(found[seed * n :])


def slices(n: int) -> list[slice]:
    """Batches of 64.

    >>> slices(100)
    [slice(0, 64, None), slice(64, 100, None)]
    """
    return [slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
