"""Slots by what the last queries look at."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Need
from kvferry.select.attention import looked, on_slots, pooled, pose_last
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class SnapKV(TokenSelector):
    """Keeps what the last `window` queries attend to, averaged over `pool` neighbours (Li et al., arXiv:2404.14469).

    SnapKV sees the question at the end of its prompt and keeps the window whole. A sender reads the context alone, so
    the window is a stand-in for the question, and its slots are scored like all others: by the queries that see them.

    >>> SnapKV(window=16).brief()
    'snapkv(window=16)'
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            what = f"snapkv(window={self.window}, pool={self.pool})"
            raise BadSpec(what, cure="window is 1 or more, pool an odd number")

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        def of_layer(layer: int) -> Float[Tensor, " tokens"]:
            return pooled(sight, looked(pose_last(sight, layer, self.window)).mean(), self.pool)

        return on_slots(sight, of_layer)
