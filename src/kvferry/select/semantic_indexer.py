"""Slots by the softmax attention of the last queries, at most `top_k` of them."""

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Need, Plan
from kvferry.select.attention import looked, on_slots, pose_last
from kvferry.select.contract import TokenSelector
from kvferry.select.sight import Budget, Sight


@dataclass(frozen=True, repr=False)
class SemanticIndexer(TokenSelector):
    """Keeps the `top_k` slots that the last `window` queries attend to most, all where there are fewer.

    Unlike the published sketch, Q of softmax(QK'/sqrt(d)) are the layer's own queries, not its last key; query heads
    share key heads, masks are causal, sinks stay, and slots keep their order. No learned indexer: that is `lightning`.

    >>> SemanticIndexer(top_k=64, sinks=4).brief()
    'semantic_indexer(top_k=64, sinks=4)'
    """

    name: ClassVar[str] = "semantic_indexer"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    top_k: int = 32
    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1 or self.window < 1:
            what = f"semantic_indexer(top_k={self.top_k}, window={self.window})"
            raise BadSpec(what, cure="Both are 1 or more")

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        """As every selector of tokens; `proportion` may leave fewer than `top_k`."""
        n_slots = int(self.eligible(sight).any(0).sum())
        share = min(self.proportion, self.top_k / n_slots)
        return TokenSelector.plan(replace(self, proportion=share), sight, budget)

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        return on_slots(sight, lambda layer: looked(pose_last(sight, layer, self.window)).mean())
