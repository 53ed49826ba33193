"""Layers at equal distances."""

from dataclasses import dataclass
from typing import ClassVar

from kvferry.errors import BadSpec
from kvferry.select.layer_contract import LayerSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class EveryKth(LayerSelector):
    """Keeps layers 0, k, 2k and so on; where the budget has no room for all, first every 2k-th, every 4k-th, ...

    >>> EveryKth(3).brief()
    'every_kth(k=3)'
    """

    name: ClassVar[str] = "every_kth"
    k: int = 2

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BadSpec(f"every_kth(k={self.k})", cure="k is 1 or more")

    def wanted(self, sight: Sight) -> list[int]:
        n_layers = sight.kv.geometry.n_layers
        # n & -n is the largest power of two that divides n.
        return [
            n * self.k for n in sorted(range(-(-n_layers // self.k)), key=lambda n: -((n & -n) or n_layers))
        ]
