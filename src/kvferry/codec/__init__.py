"""Codecs: a cache to a frame and back. `CODECS` is light; torch is imported with the first codec that is used.

>>> CODECS.parse("int(4, group=64)")
int(bits=4, group=64, axis=token, centred=False, scale=float16, zstd=0)
"""

from typing import TYPE_CHECKING, Any

from kvferry.codec.table import CODECS

if TYPE_CHECKING:
    from kvferry.codec.base import Codec, codec_of, decode, roundtrip, wire_hash

__all__ = ["CODECS", "Codec", "codec_of", "decode", "roundtrip", "wire_hash"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvferry.codec import base

    return getattr(base, name)
