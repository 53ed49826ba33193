"""Data sets of Hugging Face as examples: of the hub, or Parquet, Arrow and saved folders on this disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from kvferry.errors import MissingExtra, UsageError
from kvferry.models.prompt import Prompt
from kvferry.train.sources.rows import QUESTION_KEYS, Rows, Table, question_rows, text_rows

MAX_ROWS = 100_000
"""Rows that are read, from the first on: texts are held in memory."""


@dataclass(frozen=True)
class DataSet(Table):
    """Rows of a hub id, a `.parquet` or `.arrow` file, or a folder; of several splits, `train`.

    With a column, passages of its texts; without, questions where there are `context`, `question` and `answer`, else
    passages of `text`. Our own splits are cut from the rows as for JSON lines. Needs the extra `data`.
    """

    where: str
    column: str | None
    prompt: Prompt

    @property
    def name(self) -> str:
        return Path(self.where).name

    def rows(self) -> Rows:
        """Raises `UsageError` for a data set that cannot be read or has other columns."""
        columns = set(self._content[0]) if self._content else set()
        if self.column is None and columns.issuperset(QUESTION_KEYS):
            return question_rows(self._content, self.prompt)
        column = self.column or "text"
        if column not in columns:
            what = f"{self.where} has no column {column!r}, but {', '.join(sorted(columns)) or 'no row'}"
            raise UsageError(what, cure=f"Name one that holds texts: datasets:{self.where}:COLUMN")
        return text_rows([str(row[column] or "") for row in self._content])

    @cached_property
    def _content(self) -> list[dict[str, Any]]:
        return _read(self.where)


def data_set(spec: str, prompt: Prompt) -> DataSet:
    """`NAME` or `NAME:COLUMN`, where a name is a hub id or a path."""
    where, _, column = spec.partition(":")
    return DataSet(where, column or None, prompt)


def _read(where: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "data") from None
    try:
        return list(islice(_open(datasets, where), MAX_ROWS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        cure = "Give a hub id, a Parquet or Arrow file, or a folder written by save_to_disk"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot read the data set {where!r}: {line[:200]}", cure=cure) from None


def _open(datasets: ModuleType, where: str) -> Iterable[dict[str, Any]]:
    """Read as a stream, so that no more of it is fetched than is used."""
    path = Path(where)
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=where, split="train", streaming=True)
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(where)
    if path.is_dir() and not list(path.glob("*.parquet")):
        saved = datasets.load_from_disk(where)
        return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset(where, split="train", streaming=True)
