"""JSON lines as examples: of questions, or of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.errors import UsageError
from kvferry.models.prompt import Prompt
from kvferry.train.sources.example import Source
from kvferry.train.sources.files import read_lines
from kvferry.train.sources.rows import QUESTION_KEYS, Rows, Table, question_rows, text_rows


@dataclass(frozen=True)
class QuestionFile(Table):
    """JSON lines with `context`, `question` and `answer`; every tenth context is dev, every ninth of ten test."""

    path: Path
    prompt: Prompt

    @property
    def name(self) -> str:
        return self.path.name

    def rows(self) -> Rows:
        """Raises `UsageError` for a line without these fields."""
        return question_rows(_objects(self.path, QUESTION_KEYS), self.prompt)


@dataclass(frozen=True)
class TextLines(Table):
    """JSON lines with `text`, passages of which are read as in `TextFile`; splits as in `QuestionFile`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def rows(self) -> Rows:
        """Raises `UsageError` for a line without a text."""
        return text_rows([str(row["text"] or "") for row in _objects(self.path, ("text",))])


def json_lines(path: Path, prompt: Prompt) -> Source:
    """The source for a file, by what its first line holds."""
    rows = read_lines(path)
    return TextLines(path) if rows and "text" in rows[0][1] else QuestionFile(path, prompt)


def _objects(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for where, row in read_lines(path):
        missing = [key for key in keys if key not in row]
        if missing:
            raise UsageError(
                f"{where} has no {', '.join(missing)}", cure=f"Give JSON lines with {', '.join(keys)}"
            )
        rows.append(row)
    return rows
