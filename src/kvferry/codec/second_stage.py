"""The second stage: a body through zstd, where that makes it smaller.

A reader knows the length of the plain body from the shape, so a body of exactly that length is plain, and anything
else must be one zstd frame that states that length: a decompression bomb is refused before it is opened.
"""

import zstandard

from kvferry.errors import BadSpec, Malformed

_HIGHEST = 22
_SMALLEST_WINDOW = 1 << 10


def check_level(level: int) -> None:
    """Raise `BadSpec` unless it is 0, for none, or a level of zstd."""
    if not 0 <= level <= _HIGHEST:
        raise BadSpec(f"zstd={level}", cure=f"0 is none, 1 to {_HIGHEST} are fast to small")


def squeezed(plain: bytes, level: int) -> bytes:
    """The shorter of the plain body and its zstd frame.

    >>> len(squeezed(bytes(1000), 1)) < 30, squeezed(b"ab", 1)
    (True, b'ab')
    """
    small = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(plain)
    return small if len(small) < len(plain) else plain


def unsqueezed(body: bytes, length: int) -> bytes:
    """The plain body of `length` bytes; `Malformed` unless `body` is it, or one shorter zstd frame that states it.

    >>> unsqueezed(squeezed(bytes(1000), 1), 1000) == bytes(1000)
    True
    """
    if len(body) == length:
        return body
    try:
        frame = zstandard.get_frame_parameters(body)
        stated = (frame.content_size, frame.dict_id) == (length, 0)
        if stated and len(body) < length and frame.window_size <= max(length, _SMALLEST_WINDOW):
            return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"a body of {len(body)} bytes: {error}", cure="Send it plain or as zstd") from None
    raise Malformed(
        f"a body of {len(body)} bytes is no zstd frame of {length}", cure="State the length of the plain body"
    )
