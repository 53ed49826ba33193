"""Caps in bytes as the command line says them."""

from itertools import count, takewhile

from kvferry.errors import UsageError

Cap = int | None
"""None: no cap."""
DEFAULT_CAPS = "256,512,1024,1536,2048,3072,4096,6144,8192,12288,full"
TEXT_CAPS = (96, 112, 128, 160, 192, 224, 256, 320, 448, 640, 832, 1024)
"""Texts are small and have caps of their own, up to the size at which all of a text of these tasks fits."""
FULL = "full"


def caps_of(text: str) -> tuple[Cap, ...]:
    """Increasing caps, `full` last; `...` goes on doubling until the next number.

    >>> caps_of("64,128,...,1024,full")
    (64, 128, 256, 512, 1024, None)
    >>> caps_of("full, 300")
    (300, None)
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    found: set[int] = set()
    for index, word in enumerate(words):
        found |= _doubled(words, index) if word == "..." else set() if word == FULL else {_number(word)}
    if not words or not (found or FULL in words):
        raise UsageError(f"{text!r} names no cap", cure="Write numbers of bytes, say 64,128,...,4096,full")
    return (*sorted(found), *((None,) if FULL in words else ()))


def cap_name(cap: Cap) -> str | int:
    """As it stands in a recipe."""
    return FULL if cap is None else cap


def _doubled(words: list[str], index: int) -> set[int]:
    if not 0 < index < len(words) - 1:
        raise UsageError("'...' at the edge", cure="Write it between two caps: 64,128,...,4096")
    first, last = _number(words[index - 1]), _number(words[index + 1])
    if last <= first:
        raise UsageError(f"{first},...,{last} goes down", cure="Write the smaller cap first: 64,...,4096")
    return set(takewhile(lambda cap: cap < last, (first << power for power in count())))


def _number(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise UsageError(f"{word!r} is no cap", cure="Write a whole number of bytes, 1 or more, or full")
    return int(word)
