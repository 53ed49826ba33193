"""What a map is fitted on: contexts, and continuations of which some pieces are scored."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from kvferry.errors import UsageError
from kvferry.models.prompt import Prompt
from kvferry.models.zoo.worlds import Document, make_document

Split = Literal["train", "dev", "test"]
PASSAGE_CHARS, CONTINUATION_CHARS = 400, 120
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
class Example:
    """A context and what follows it: pieces of text, each with whether the receiver must predict it."""

    context: str
    pieces: tuple[tuple[str, bool], ...]


@runtime_checkable
class Source(Protocol):
    """Endless seeded examples of a split; the same seed gives the same examples."""

    @property
    def name(self) -> str: ...

    def examples(self, split: Split, seed: int) -> Iterator[Example]: ...


@dataclass(frozen=True)
class Worlds:
    """The zoo's small worlds, several questions each. Neighbours are of one shape, so that batches pad little."""

    name: str = "worlds"
    n_questions: int = 8
    n_alike: int = 16

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        rng = random.Random(f"{split}{seed}")
        while True:
            kind, n_facts, n_fillers = rng.choice(_SHAPES)
            for number in [rng.getrandbits(40) for _ in range(self.n_alike)]:
                yield _of_document(
                    make_document(
                        number,
                        kind=kind,
                        n_facts=n_facts,
                        n_fillers=n_fillers,
                        n_questions=self.n_questions,
                        split=split,
                    )
                )


@dataclass(frozen=True)
class TextFile:
    """Passages of a plain text; the continuation after the first word is scored. Splits are disjoint stretches."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        text = _stretch(" ".join(_read(self.path).split()), split)
        rng = random.Random(f"{split}{seed}")
        while True:
            start = _border(text, rng.randrange(len(text) - 2 * (PASSAGE_CHARS + CONTINUATION_CHARS)))
            end = _border(text, start + PASSAGE_CHARS)
            yield _of_passage(text[start:end], text[end : end + CONTINUATION_CHARS])


@dataclass(frozen=True)
class QuestionFile:
    """JSON lines with `context`, `question` and `answer`; every tenth line is dev, every ninth of ten test."""

    path: Path
    prompt: Prompt

    @property
    def name(self) -> str:
        return self.path.name

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        rows = [row for i, row in enumerate(_rows(self.path)) if _split_of_line(i) == split]
        if not rows:
            raise UsageError(f"{self.path} has no line for {split}", cure="Give at least ten lines")
        rng = random.Random(f"{split}{seed}")
        while True:
            row = rng.choice(rows)
            pieces = ((self.prompt.question(row["question"]), False), (f" {row['answer']}", True))
            yield Example(row["context"], pieces)


def source_of(path: Path | None, prompt: Prompt) -> Source:
    """The source for `--data`: the worlds, a text file, or JSON lines of questions."""
    if path is None:
        return Worlds()
    return QuestionFile(path, prompt) if path.suffix == ".jsonl" else TextFile(path)


def _of_document(document: Document) -> Example:
    pieces = list(document.pieces())
    first = pieces[0][0].removeprefix(document.context)
    return Example(document.context, ((first, False), *pieces[1:]))


def _of_passage(context: str, continuation: str) -> Example:
    first = max(continuation.find(" ", 1), 1)
    return Example(context.strip(), ((continuation[:first], False), (continuation[first:], True)))


def _border(text: str, near: int) -> int:
    """The next space, or the place itself in a script that has none nearby."""
    found = text.find(" ", near, near + CONTINUATION_CHARS)
    return near if found < 0 else found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        cure = "Give a UTF-8 text or JSON lines file"
        raise UsageError(f"cannot read {path}: {error.strerror}", cure=cure) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 at byte {error.start}", cure="Convert it to UTF-8") from None


def _stretch(text: str, split: Split) -> str:
    """80 % of the text for training, then 10 % each."""
    cuts = {"train": (0.0, 0.8), "dev": (0.8, 0.9), "test": (0.9, 1.0)}[split]
    part = text[int(cuts[0] * len(text)) : int(cuts[1] * len(text))]
    least = 4 * (PASSAGE_CHARS + CONTINUATION_CHARS)
    if len(part) < least:
        raise UsageError(
            f"{len(part)} characters of text for {split}", cure=f"Give at least {10 * least} characters"
        )
    return part


def _split_of_line(index: int) -> Split:
    return {9: "dev", 8: "test"}.get(index % 10, "train")  # type: ignore[return-value]


def _rows(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: str(row[key]) for key in ("context", "question", "answer")})
        except (ValueError, KeyError, TypeError) as error:
            cure = "Give JSON lines with context, question and answer"
            raise UsageError(f"line {number} of {path}: {error!r}", cure=cure) from None
    return rows
