"""How what arrives joins what the receiver has: its layout, packing and merging, and the fusers."""

from kvferry.fuse.table import FUSERS

__all__ = ["FUSERS"]
