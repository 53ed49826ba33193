"""The items of an evaluation: twins, so that one question has two right answers, each in its own world."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvferry.errors import UsageError
from kvferry.models.zoo.worlds import Item, make_item, make_twins

BATCH = 64
_TWINS_PER_SEED = 1_000_000  # seeds of one evaluation never meet those of another


@dataclass(frozen=True)
class Batch:
    """Items of which each two neighbours, 0 and 1, 2 and 3 ..., are twins."""

    items: tuple[Item, ...]

    @property
    def contexts(self) -> list[str]:
        return [item.context for item in self.items]

    @property
    def questions(self) -> list[str]:
        return [item.question for item in self.items]

    @property
    def answers(self) -> list[str]:
        return [item.answer for item in self.items]

    @property
    def twins(self) -> "Batch":
        """The same questions, each in the other world."""
        return Batch(tuple(self.items[twin] for twin in swapped(len(self.items))))


def swapped(n: int) -> list[int]:
    """Indices with neighbours exchanged.

    >>> swapped(4)
    [1, 0, 3, 2]
    """
    return [index ^ 1 for index in range(n)]


@dataclass(frozen=True)
class Worlds:
    """Which items: kinds of world in turn, `n_facts` facts each."""

    kinds: tuple[str, ...] = ("place", "met")
    n_facts: int = 8
    split: Literal["train", "test"] = "test"

    def __str__(self) -> str:
        return f"worlds({'+'.join(self.kinds)}, n_facts={self.n_facts})"

    def twins(self, n_items: int, seed: int) -> list[Batch]:
        """`n_items` items in batches of 64, twins side by side."""
        if n_items < 2 or n_items % 2:
            raise UsageError(f"{n_items} items", cure="Items come in twins: choose an even number, 2 or more")
        drawn = tuple(item for number in range(n_items // 2) for item in self._pair(number, seed))
        return [Batch(drawn[first : first + BATCH]) for first in range(0, n_items, BATCH)]

    def others(self, n_items: int, seed: int) -> list[str]:
        """Contexts of the dev split, which shares none with the test split."""
        numbers = range(n_items)
        return [
            make_item(_seed(i, seed), kind=self._kind(i), n_facts=self.n_facts, split="dev").context
            for i in numbers
        ]

    def _pair(self, number: int, seed: int) -> tuple[Item, Item]:
        kind = self._kind(number)
        return make_twins(_seed(number, seed), kind=kind, n_facts=self.n_facts, split=self.split)

    def _kind(self, number: int) -> str:
        return self.kinds[number % len(self.kinds)]


def _seed(number: int, seed: int) -> int:
    return seed * _TWINS_PER_SEED + number


def chance(batches: Sequence[Batch]) -> float:
    """The accuracy of guessing a word of the right type: the mean over items of 1 / number of choices."""
    return float(np.mean([1 / len(item.choices) for batch in batches for item in batch.items]))


def right(texts: Sequence[str], answers: Sequence[str]) -> NDArray[np.int64]:
    """1 where the whole answer is the expected word, else 0.

    >>> right([" Oslo", "Oslo Oslo"], ["Oslo", "Oslo"]).tolist()
    [1, 0]
    """
    return np.array([int(text.strip() == answer) for text, answer in zip(texts, answers, strict=True)])
