"""The codec `ecsq`."""

from kvferry.codec.ecsq.codec import Ecsq

__all__ = ["Ecsq"]
