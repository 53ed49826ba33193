"""A message on disk: the file is the message and nothing else, so its size is what the meter counts."""

import contextlib
import os
import secrets
from pathlib import Path

from kvferry.errors import LinkError
from kvferry.link.channel import MAX_MESSAGE_BYTES, Meter, require_size


def write_message(path: Path, data: bytes, meter: Meter, kind: str = "message") -> None:
    """Write beside, then rename: a reader sees the whole message, the one before it, or none."""
    write_whole(path, data)
    meter.sent[kind] += len(data)


def write_whole(path: Path, data: bytes) -> None:
    """Any file, whole or not at all; `LinkError` where it cannot be, with nothing left behind."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _refuse_special(path)
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise LinkError(
            f"cannot write {len(data)} bytes to {path}: {error.strerror}",
            cure="Name a file in an existing folder with enough space that you may write to",
        ) from None
    finally:
        with contextlib.suppress(OSError):  # where nothing could be made, nothing is left either
            part.unlink()


def _refuse_special(path: Path) -> None:
    """A rename would put a plain file in the place of a device."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise LinkError(f"{path} is no regular file", cure="Name a file; a device or pipe cannot be replaced")


def read_message(
    path: Path, meter: Meter, kind: str = "message", *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> bytes:
    """The message in a file; `LimitExceeded`, before reading, when it is too large."""
    try:
        with path.open("rb") as file:
            require_size(os.fstat(file.fileno()).st_size, max_message_bytes, f"in {path}")
            data = file.read(max_message_bytes)
    except OSError as error:
        raise LinkError(
            f"cannot read a message from {path}: {error.strerror}",
            cure="Name a file that write_message has written and that you may read",
        ) from None
    meter.received[kind] += len(data)
    return data
