"""Files that are written whole or not at all. At the ground, because every room writes some."""

import contextlib
import os
import secrets
from pathlib import Path

from kvferry.errors import KvferryError

CURE = "Name a file in a folder with enough space that you may write to"


def write_whole(path: Path, data: bytes, error: type[KvferryError], *, cure: str = CURE) -> None:
    """Write beside, then rename: a reader sees the whole file, the one before it, or none.

    Raises `error` with the `cure` where it cannot be written; what lay there stays, and nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        refuse_special(path, error)
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as cause:
        what = f"cannot write {len(data)} bytes to {path}: {cause.strerror}"
        raise error(what, cure=cure) from None
    finally:
        with contextlib.suppress(OSError):  # where nothing could be made, nothing is left either
            part.unlink()


def refuse_special(path: Path, error: type[KvferryError]) -> None:
    """A rename would put a plain file in the place of a device."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise error(f"{path} is no regular file", cure="Name a file; a device or pipe cannot be replaced")
