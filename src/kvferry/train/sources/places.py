"""Facts about places alone: the kind of item that the zoo's pairs are judged by."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from kvferry.models.zoo.worlds import make_document
from kvferry.train.sources.example import Example, Split
from kvferry.train.sources.worlds import example_of

_SEEDS = 1_000_003
"""Documents of one seed never meet those of another."""


@dataclass(frozen=True)
class Places:
    """Contexts of facts about places, with so many questions each."""

    n_facts: int = 8
    n_questions: int = 8
    name: str = "places"

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        for number in count(seed * _SEEDS):
            yield example_of(
                make_document(number, n_facts=self.n_facts, n_questions=self.n_questions, split=split)
            )
