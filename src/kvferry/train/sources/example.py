"""What a map is fitted on: contexts, and continuations of which some pieces are scored."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol, runtime_checkable

Split = Literal["train", "dev", "test"]
PASSAGE_CHARS, CONTINUATION_CHARS = 400, 120


@dataclass(frozen=True)
class Example:
    """A context and what follows it: pieces of text, each with whether the receiver must predict it."""

    context: str
    pieces: tuple[tuple[str, bool], ...]


@runtime_checkable
class Source(Protocol):
    """Endless seeded examples of a split; the same seed gives the same examples."""

    @property
    def name(self) -> str: ...

    def examples(self, split: Split, seed: int) -> Iterator[Example]: ...


def require_splits(source: Source) -> None:
    """Draw an example of each split: a text too short for one is refused now, not when training is done.

    Raises what the source raises.
    """
    splits: tuple[Split, ...] = ("train", "dev", "test")
    for split in splits:
        next(source.examples(split, 0))


def passage(text: str, rng: Random) -> Example:
    """A stretch of a text and what follows it, scored after its first word. A short text is cut at three quarters."""
    room = len(text) - 2 * (PASSAGE_CHARS + CONTINUATION_CHARS)
    start = border(text, rng.randrange(room)) if room > 0 else 0
    length = PASSAGE_CHARS if room > 0 else 3 * len(text) // 4
    end = border(text, start + length)
    context, continuation = text[start:end], text[end : end + CONTINUATION_CHARS]
    first = max(continuation.find(" ", 1), 1)
    return Example(context.strip(), ((continuation[:first], False), (continuation[first:], True)))


def border(text: str, near: int) -> int:
    """The next space, or the place itself in a script that has none nearby."""
    found = text.find(" ", near, near + CONTINUATION_CHARS)
    return near if found < 0 else found
