"""Maps from a sender's cache to a receiver's, both in content space."""

from kvferry.align.table import ALIGNERS

__all__ = ["ALIGNERS"]
