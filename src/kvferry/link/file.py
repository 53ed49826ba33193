"""A message on disk: the file is the message and nothing else, so its size is what the meter counts."""

import os
from pathlib import Path

from kvferry.errors import LinkError
from kvferry.files import write_whole
from kvferry.link.channel import MAX_MESSAGE_BYTES, Meter, require_size


def write_message(path: Path, data: bytes, meter: Meter, kind: str = "message") -> None:
    """Write beside, then rename: a reader sees the whole message, the one before it, or none."""
    write_whole(path, data, LinkError)
    meter.sent[kind] += len(data)


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
