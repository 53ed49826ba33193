"""The zoo's worlds with one question each, as they are asked when a model is examined."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from kvferry.models.zoo.worlds import Item, continuation, make_item
from kvferry.train.sources.example import Example, Split

_ITEMS_PER_SEED = 1_000_000


@dataclass(frozen=True)
class Items:
    """One kind of world, `n_facts` facts each."""

    kind: str
    n_facts: int = 8

    @property
    def name(self) -> str:
        return f"items({self.kind}, n_facts={self.n_facts})"

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        first = seed * _ITEMS_PER_SEED
        for number in count(first):
            yield example_of(make_item(number, kind=self.kind, n_facts=self.n_facts, split=split))


def example_of(item: Item) -> Example:
    """The question is read, the answer is scored."""
    question = item.prompt.removeprefix(item.context)
    return Example(item.context, ((question, False), (continuation(item.answer), True)))
