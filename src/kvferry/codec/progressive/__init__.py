"""The codec `progressive`: a message that can stop anywhere."""

from kvferry.codec.progressive.codec import Progressive
from kvferry.codec.progressive.prefix import decode_prefix

__all__ = ["Progressive", "decode_prefix"]
