"""Slots by a fitted indexer: what a small product of its own says that queries will look at."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec, UsageError
from kvferry.kv import Geometry, Need
from kvferry.metrics.attention import softmax_seen, visible_slots
from kvferry.select.attention import on_slots, recorded
from kvferry.select.contract import TokenSelector
from kvferry.select.indexer import INDEXERS, Indexer
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class Lightning(TokenSelector):
    """Keeps what a lightning indexer expects the last `window` queries to look at, mean over those that see it.

    `indexer` is a folder of `kvferry fit-indexer` or a hub id, for the very model that reads. It needs the inputs of
    the layers, not their attention. It does not see the question: a window stands in for it.

    >>> Lightning(indexer="llama.indexer", window=16).brief()
    "lightning(indexer='llama.indexer', window=16)"
    """

    name: ClassVar[str] = "lightning"
    needs: ClassVar[tuple[Need, ...]] = ("hidden_states",)
    indexer: str = ""
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise BadSpec(f"lightning(window={self.window})", cure="window is 1 or more")

    def fitted(self) -> tuple[str, ...]:
        return (INDEXERS.digest(self.indexer),) if self.indexer else ()

    def require_sender(self, geometry: Geometry) -> None:
        self._indexer(geometry, "cpu")

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        indexer = self._indexer(sight.read.geometry, sight.read.device)
        return on_slots(sight, lambda layer: expected(indexer, sight, layer, self.window))

    def _indexer(self, geometry: Geometry, device: torch.device | str) -> Indexer:
        if not self.indexer:
            cure = "Fit one: kvferry fit-indexer --model ... --out DIR, then lightning(indexer='DIR')"
            raise UsageError("lightning without an indexer", cure=cure)
        return INDEXERS.load(self.indexer, geometry, device)


def expected(indexer: Indexer, sight: Sight, layer: int, window: int) -> Float[Tensor, " tokens"]:
    """The share that the last `window` queries are expected to give each token, mean over those that see it."""
    states = recorded(sight.evidence.hidden_states, "hidden_states")[layer]
    read, positions = sight.read, sight.read.positions[0]
    asking = positions[:, -window:]
    seen = visible_slots(read.geometry.layers[layer], read.present[layer], positions, asking)
    with torch.no_grad():
        scores = indexer(layer, states, positions, asking.shape[1])
    shares = softmax_seen(scores.unsqueeze(1), seen, None)[0, 0]
    return shares.sum(0) / seen[0].sum(0).clamp(min=1)
