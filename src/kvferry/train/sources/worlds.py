"""The zoo's small worlds as examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from kvferry.models.zoo.worlds import Document, make_document
from kvferry.train.sources.example import Example, Split

_SHAPES = (
    ("place", 4, 0),
    ("place", 8, 0),
    ("place", 8, 4),
    ("place", 32, 0),
    ("met", 4, 0),
    ("met", 8, 0),
    ("met", 8, 4),
    ("met", 16, 0),
    ("needle", 1, 12),
    ("count", 8, 0),
)
"""Kind, facts, fillers. Short worlds are quick, and what they teach carries over; long ones keep it honest."""


@dataclass(frozen=True)
class Worlds:
    """The zoo's small worlds, several questions each. Neighbours are of one shape, so that batches pad little."""

    name: str = "worlds"
    n_questions: int = 8
    n_alike: int = 16

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        rng = Random(f"{split}{seed}")
        while True:
            kind, n_facts, n_fillers = rng.choice(_SHAPES)
            for number in [rng.getrandbits(40) for _ in range(self.n_alike)]:
                yield example_of(
                    make_document(
                        number,
                        kind=kind,
                        n_facts=n_facts,
                        n_fillers=n_fillers,
                        n_questions=self.n_questions,
                        split=split,
                    )
                )


def example_of(document: Document) -> Example:
    """A context, and its questions with their answers scored."""
    pieces = list(document.pieces())
    first = pieces[0][0].removeprefix(document.context)
    return Example(document.context, ((first, False), *pieces[1:]))
