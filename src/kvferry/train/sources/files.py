"""Text and JSON lines from files; whatever cannot be read is an error that names file and line."""

import json
from pathlib import Path
from typing import Any

from kvferry.errors import UsageError


def read_text(path: Path) -> str:
    """Raises `UsageError` for a file that is missing or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        cure = "Give a file of UTF-8 text that you may read"
        raise UsageError(f"cannot read {path}: {error.strerror}", cure=cure) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 at byte {error.start}", cure="Convert it to UTF-8") from None


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Where each JSON object of a file stands, and the object; blank lines are passed over.

    Raises `UsageError` as `read_text` does, and for a line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is no JSON: {error}", cure="Give one JSON object a line") from None
        if not isinstance(row, dict):
            raise UsageError(
                f"{where} is {type(row).__name__}, no object", cure="Give one JSON object a line"
            )
        rows.append((where, row))
    return rows
