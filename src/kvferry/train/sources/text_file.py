"""A plain text as examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvferry.errors import UsageError
from kvferry.train.sources.example import CONTINUATION_CHARS, PASSAGE_CHARS, Example, Split, passage
from kvferry.train.sources.files import read_text

_LEAST_CHARS = 4 * (PASSAGE_CHARS + CONTINUATION_CHARS)


@dataclass(frozen=True)
class TextFile:
    """Passages of a plain text; the continuation after the first word is scored. Splits are disjoint stretches."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        """Raises `UsageError` for a file that cannot be read or is too short."""
        text = _stretch(" ".join(read_text(self.path).split()), split)
        rng = Random(f"{split}{seed}")
        while True:
            yield passage(text, rng)


def _stretch(text: str, split: Split) -> str:
    """80 % of the text for training, then 10 % each."""
    cuts = {"train": (0.0, 0.8), "dev": (0.8, 0.9), "test": (0.9, 1.0)}[split]
    part = text[int(cuts[0] * len(text)) : int(cuts[1] * len(text))]
    if len(part) < _LEAST_CHARS:
        raise UsageError(
            f"{len(part)} characters of text for {split}",
            cure=f"Give at least {10 * _LEAST_CHARS} characters",
        )
    return part
