"""Short stories of the shared folder, each once, dealt into splits by their own hash.

Rule: a story is in one split for good, whatever is read beside it, so that no fit ever sees a test story.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

from kvferry.errors import FolderError
from kvferry.lab.wire.texts import SHARED, shared_folder
from kvferry.train.examples import Split

_N_SAME = 100  # stories that agree in so many characters are one story
_SHARES = {"test": 0.26, "dev": 0.36, "train": 1.0}
"""Upper ends: 26 % are for test, 10 % for dev."""


@cache
def stories(split: Split) -> tuple[str, ...]:
    """ASCII stories of a split, paragraphs joined by a newline, in an order that no file gives.

    Raises `FolderError` where there is no shared folder.
    """
    found = {story[:_N_SAME]: story for story in _read()}
    ranked = sorted((hashlib.sha256(story.encode()).digest(), story) for story in found.values())
    return tuple(story for digest, story in ranked if _split_of(digest) == split)


def _split_of(digest: bytes) -> str:
    share = int.from_bytes(digest[:4], "big") / 2**32
    return next(split for split, end in _SHARES.items() if share < end)


def _read() -> list[str]:
    folder = shared_folder()
    texts = (folder or Path()) / "data" / "text"
    try:
        first = (texts / "tinystories_cased_a.txt").read_text(encoding="utf-8")
        second = (texts / "tinystories_cased_b.txt").read_text(encoding="utf-8")
    except OSError as error:
        cure = f"Let ${SHARED} name the shared folder"
        raise FolderError("there are no stories to read", cure=cure) from error
    # One file has a story a paragraph block, the other blank lines everywhere.
    parts = (
        re.split(r"(?<!\n)\n(?!\n)", first)
        + re.split(r"\n\n(?=Once upon a time|One day, there was)", second)[1:]
    )
    return [re.sub(r"\s*\n\s*", "\n", part.strip()) for part in parts if part.isascii()]
