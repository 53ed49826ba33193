"""Codecs that offer precision classes, and say beforehand what each would cost and lose."""

from typing import Protocol, runtime_checkable

from kvferry.kv import KV, Menu


@runtime_checkable
class Offering(Protocol):
    """A codec with a menu."""

    def menu(self, kv: KV, max_bytes: int | None = None) -> Menu:
        """Of one sequence, all slots; absent ones cost and lose nothing. Classes are those of interest at the cap."""
        ...
