"""Results on disk: written beside, then renamed, so that nobody reads half of one."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kvferry.errors import FolderError, UsageError
from kvferry.files import CURE, write_whole
from kvferry.lab.demo import DemoResult
from kvferry.lab.point import Point

_RESULT = TypeAdapter(DemoResult)
_POINTS = TypeAdapter(Sequence[Point])


def write_file(path: Path, data: bytes) -> None:
    """Write `data`, its folder too; an existing file is replaced whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {path.parent}: {error.strerror}", cure=CURE) from None
    write_whole(path, data, UsageError)


def save_points(points: Sequence[Point], path: Path) -> None:
    """As JSON."""
    write_file(path, _POINTS.dump_json(points, indent=1) + b"\n")


def save_result(result: DemoResult, path: Path) -> None:
    """As JSON."""
    write_file(path, _RESULT.dump_json(result, indent=1) + b"\n")


def load_result(path: Path) -> DemoResult:
    """The inverse of `save_result`; `FolderError` for a file that is no result."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = f"{path} holds no demo result: {str(error).splitlines()[0]}"
        raise FolderError(what, cure="Give a file written by kvferry demo --json") from None
