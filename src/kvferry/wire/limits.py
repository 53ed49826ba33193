"""What a reader accepts at most. Every limit is checked before the memory it bounds is taken."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Ceilings of a reader; a message above one of them raises `LimitExceeded`.

    Reading a frame takes at most `max_bytes` beside the input; decoding a cache takes 4 bytes for each of at most
    `max_elements` numbers.

    >>> Limits(max_bytes=4096).max_bytes
    4096
    """

    max_bytes: int = 1 << 30
    """Length of one frame, and of all pieces of frames that are still coming. 1 GiB holds 32k tokens of an 8-bit cache
    of a 0.5B to 3B model."""
    max_tokens: int = 1 << 20
    """Tokens of one frame: the longest contexts in use."""
    max_elements: int = 1 << 30
    """Numbers of the cache that a frame unfolds to."""
    max_segments: int = 4096
    """Segments of one frame: one per layer and some, many times over."""
    max_json: int = 1 << 20
    """Length of a JSON body: hellos and reports are small."""
    max_in_flight: int = 64
    """Messages whose datagrams are still coming."""


DEFAULT_LIMITS = Limits()
