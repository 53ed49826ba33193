"""What arrives takes the place of what the receiver has."""

from typing import ClassVar

from kvferry.fuse.contract import Fuser, Gives
from kvferry.kv import KV


class Replace(Fuser):
    """The arrived cache as it is. It must be aligned, so both geometries are the receiver's."""

    name: ClassVar[str] = "replace"
    gives: ClassVar[Gives] = "cache"

    def forward(self, own: KV, arrived: KV) -> KV:
        self.require_models(own, arrived)
        return arrived
