"""A result of the bench on disk."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kvferry.errors import FolderError
from kvferry.lab.ledger import write_file
from kvferry.lab.wire.bench import WireResult

_RESULT = TypeAdapter(WireResult)


def save_wire(result: WireResult, path: Path) -> None:
    """As JSON."""
    write_file(path, _RESULT.dump_json(result, indent=1) + b"\n")


def load_wire(path: Path) -> WireResult:
    """The inverse of `save_wire`; `FolderError` for a file that is no result."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = f"{path} holds no result of the wire's bench: {str(error).splitlines()[0]}"
        raise FolderError(what, cure="Give a file written by kvferry bench wire --json") from None
