"""What has been measured, line by line, so that a run that was ended goes on where it was.

Rule 1: a line is keyed by all that its numbers depend on, and by nothing else: not by commit, machine or file name.
Rule 2: of two lines with one key the later holds. A last line that was cut off is forgotten; damage elsewhere is not.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kvferry.errors import FolderError, UsageError
from kvferry.files import CURE
from kvferry.lab.curve.outcome import Outcome
from kvferry.lab.ledger import write_file
from kvferry.lab.point import Point

_FORMAT = 1


@dataclass(frozen=True)
class Line:
    """One way of sending, one cap, one seed: the point, and the items behind it."""

    key: str
    point: Point
    outcome: Outcome
    seconds: float


_LINE = TypeAdapter(Line)


def key_of(settings: Mapping[str, str | int]) -> str:
    """The hash of what a measurement depends on.

    >>> key_of({"cap": 64, "seed": 0}) == key_of({"seed": 0, "cap": 64}) != key_of({"cap": 64, "seed": 1})
    True
    """
    said = json.dumps({"format": _FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class Ledger:
    """The lines of a file, and those that are added to it; without a file they are only remembered.

    A file that is not there comes with the first line, so that a look into an empty ledger leaves none behind.
    """

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self.path = path
        self._lines: dict[str, Line] = {}
        if path is not None and path.exists():
            held = _read(path)
            self._lines = {line.key: line for line in held} if resume else {}
            write_file(path, b"".join(map(_written, held)))

    def get(self, key: str) -> Line | None:
        return self._lines.get(key)

    def add(self, line: Line) -> None:
        """Remembered, and on the disk when this returns."""
        self._lines[line.key] = line
        if self.path is None:
            return
        if not self.path.exists():
            write_file(self.path, b"")
        try:
            with self.path.open("ab") as file:
                file.write(_written(line))
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}", cure=CURE) from None


def _written(line: Line) -> bytes:
    return _LINE.dump_json(line) + b"\n"


def _read(path: Path) -> list[Line]:
    try:
        *rows, _cut_off = path.read_bytes().split(b"\n")  # whole lines end with a newline
        return [_LINE.validate_json(row) for row in rows if row]
    except (OSError, ValidationError) as error:
        what = f"{path} is no ledger of kvferry curve: {str(error).splitlines()[0]}"
        raise FolderError(what, cure="Give another --cache, or move the file away") from None
