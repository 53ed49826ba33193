"""Rows of a table as examples: of texts, or of questions about contexts.

Rule 1: rows of one context stay in one split, or what is tested on would have been trained on.
Rule 2: rows that hold nothing to learn from are skipped and counted; none left is an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from kvferry.errors import UsageError
from kvferry.models.prompt import Prompt
from kvferry.train.sources.example import Example, Split, passage

QUESTION_KEYS = ("context", "question", "answer")
LEAST_CHARS = 40
"""Shorter texts have no room for a context and a continuation."""


@dataclass(frozen=True)
class Row:
    """Its text, or the context of its question; and the example that it gives, which may be drawn by chance."""

    context: str
    example: Callable[[Random], Example]


@dataclass(frozen=True)
class Rows:
    """Those that can be used, and how many there were."""

    usable: list[Row]
    n_all: int

    def of(self, split: Split) -> list[Row]:
        """Every tenth context is dev, every ninth of ten test."""
        numbers: dict[str, int] = {}
        for row in self.usable:
            numbers.setdefault(row.context, len(numbers))
        kinds = {9: "dev", 8: "test"}
        return [row for row in self.usable if kinds.get(numbers[row.context] % 10, "train") == split]


class Table(ABC):
    """A source that is a table of rows, drawn from again and again."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def rows(self) -> Rows:
        """Read them; raises `UsageError` where that cannot be."""

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        """Raises `UsageError` for what cannot be read, and where no row is left for the split."""
        rows = self.rows()
        mine, rng = rows.of(split), Random(f"{split}{seed}")
        if not mine:
            what = f"{self.name} has no row for {split}: {len(rows.usable)} of {rows.n_all} can be used"
            raise UsageError(what, cure="Give at least ten rows of different contexts that are not empty")
        while True:
            yield rng.choice(mine).example(rng)

    def described(self) -> str:
        """The name, and how many rows were skipped: for cards."""
        rows = self.rows()
        n = rows.n_all - len(rows.usable)
        return f"{self.name} ({n} of {rows.n_all} rows skipped: empty or too short)" if n else self.name


def text_rows(texts: Sequence[str]) -> Rows:
    """Passages of texts; empty ones and those under `LEAST_CHARS` cannot be used."""
    plain = [" ".join(text.split()) for text in texts]
    usable = [
        Row(text, lambda rng, text=text: passage(text, rng)) for text in plain if len(text) >= LEAST_CHARS
    ]
    return Rows(usable, len(texts))


def question_rows(rows: Sequence[Mapping[str, Any]], prompt: Prompt) -> Rows:
    """Questions as the prompt asks them, answers scored; rows with an empty field cannot be used."""
    texts = [{key: "" if row[key] is None else str(row[key]) for key in QUESTION_KEYS} for row in rows]
    usable = [_question_row(row, prompt) for row in texts if all(text.strip() for text in row.values())]
    return Rows(usable, len(rows))


def _question_row(row: Mapping[str, str], prompt: Prompt) -> Row:
    pieces = ((prompt.question(row["question"]), False), (f" {row['answer']}", True))
    example = Example(row["context"], pieces)
    return Row(row["context"], lambda rng: example)
