"""What a map is fitted on, by name: the source behind `--data`, and its examples in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kvferry.models.prompt import Prompt
from kvferry.train.sources.data_set import DataSet, data_set
from kvferry.train.sources.example import Example, Source, Split
from kvferry.train.sources.json_lines import QuestionFile, TextLines, json_lines
from kvferry.train.sources.places import Places
from kvferry.train.sources.rows import Table
from kvferry.train.sources.text_file import TextFile
from kvferry.train.sources.worlds import Worlds

__all__ = [
    "Batches",
    "DataSet",
    "Example",
    "Places",
    "QuestionFile",
    "Source",
    "Split",
    "TextFile",
    "TextLines",
    "Worlds",
    "described",
    "source_of",
]
_PREFIX = "datasets:"
_OWN: dict[str, Source] = {"worlds": Worlds(), "places": Places()}


@dataclass(frozen=True)
class Batches:
    """Endless batches of a source, the same ones each time: `batches(start)` begins with batch number `start`."""

    source: Source
    split: Split
    seed: int
    size: int

    def __call__(self, start: int) -> Iterator[list[Example]]:
        examples = islice(self.source.examples(self.split, self.seed), start * self.size, None)
        while True:
            yield list(islice(examples, self.size))


def source_of(where: Path | str | None, prompt: Prompt) -> Source:
    """The source for `--data`: nothing or `worlds`, `places`, a text, JSON lines of questions or texts,
    `datasets:NAME`, `datasets:NAME:COLUMN`, or a Parquet or Arrow file or folder of a data set.

    Raises `UsageError` for JSON lines that cannot be read.
    """
    if where is None or str(where) in _OWN:
        return _OWN["worlds" if where is None else str(where)]
    if str(where).startswith(_PREFIX):
        return data_set(str(where).removeprefix(_PREFIX), prompt)
    path = Path(where)
    if path.suffix == ".jsonl":
        return json_lines(path, prompt)
    return DataSet(str(path), None, prompt) if _is_data_set(path) else TextFile(path)


def described(source: Source) -> str:
    """What a card says of a source: its name, and how many of its rows were skipped."""
    return source.described() if isinstance(source, Table) else source.name


def _is_data_set(path: Path) -> bool:
    return path.suffix in (".parquet", ".arrow") or path.is_dir()
