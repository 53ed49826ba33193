"""What arrives stands before what the receiver has."""

from typing import ClassVar

from kvferry.fuse.contract import Fuser, Gives
from kvferry.fuse.pack import join
from kvferry.kv import KV


class Prepend(Fuser):
    """The arrived cache, then the receiver's own, moved behind it. Both are of the receiver's geometry.

    The own tokens were read without the arrived ones: their keys can be moved, but they never saw what now stands
    before them. Where that matters, inject the arrived cache and let the receiver read its tokens again.
    """

    name: ClassVar[str] = "prepend"
    gives: ClassVar[Gives] = "cache"

    def forward(self, own: KV, arrived: KV) -> KV:
        self.require_models(own, arrived)
        return join([arrived, own])
