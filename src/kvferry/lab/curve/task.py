"""What is asked: recall in worlds of the zoo, or how a story goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.errors import UnknownName, UsageError
from kvferry.models.zoo.worlds import Item, make_twins

Split = Literal["dev", "test"]
CONTINUATION = "continuation"
NEEDLE_FILLERS = 48
"""About 450 tokens of text around the one fact, as `llama` reads it."""
_KINDS = {"place": "place", "met": "met", "needle": "needle", "two_hops": "two_hop"}
_SIZES = {"place": 8, "met": 8, "needle": NEEDLE_FILLERS, "two_hops": 8}
_ITEMS_PER_SEED = 1_000_000


@dataclass(frozen=True)
class Task:
    """`size`: facts of a world, fillers around a needle; 0 for stories."""

    name: str
    size: int

    @property
    def recalls(self) -> bool:
        """Whether items are questions with words to choose from."""
        return self.name != CONTINUATION

    @property
    def metric(self) -> str:
        return "accuracy" if self.recalls else "gap_closed"

    @property
    def target(self) -> float:
        """The quality at which ways of sending are compared by their bytes."""
        return 0.9 if self.recalls else 0.8

    @property
    def block(self) -> int:
        """How many items in a row belong together."""
        return 2 if self.recalls else 1

    def __str__(self) -> str:
        return f"{self.name}:{self.size}" if self.recalls else self.name

    def require_items(self, n: int) -> None:
        """Raise `UsageError` for a number of items that cannot be had."""
        if self.recalls and (n < 2 or n % 2):
            raise UsageError(f"{n} items", cure="Items come in twins: choose an even number, 2 or more")

    def items(self, n: int, seed: int, split: Split) -> list[Item]:
        """Twins side by side, other ones for each seed."""
        self.require_items(n)
        facts, fillers = (1, self.size) if self.name == "needle" else (self.size, 0)
        kind = _KINDS[self.name]
        seeds = range(seed * _ITEMS_PER_SEED, seed * _ITEMS_PER_SEED + n // 2)
        pairs = (make_twins(s, kind=kind, n_facts=facts, n_fillers=fillers, split=split) for s in seeds)
        return [item for pair in pairs for item in pair]


def task_of(text: str) -> Task:
    """`place:16` and the like; `UnknownName`, or `UsageError` for a size that is no number.

    >>> str(task_of("needle")), task_of("continuation").metric
    ('needle:48', 'gap_closed')
    """
    name, _, size = text.partition(":")
    if name not in (*_KINDS, CONTINUATION):
        raise UnknownName("task", name, [*_KINDS, CONTINUATION])
    if size and (name == CONTINUATION or not size.isdecimal()):
        raise UsageError(f"{text!r} is no task", cure="Write place:16, needle:48, two_hops:8 or continuation")
    return Task(name, int(size) if size else _SIZES.get(name, 0))


def questions_of(items: Sequence[Item]) -> list[str]:
    return [item.question for item in items]
