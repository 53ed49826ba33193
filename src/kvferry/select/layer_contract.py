"""What selectors of whole layers share: all slots in scope of the layers that they choose, none of the others.

An aligner between models loses a token that any layer lacks, so these are for relays and fusers of one geometry.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import BadSpec, NotFinite
from kvferry.kv import Plan
from kvferry.select.contract import Selector
from kvferry.select.most import most
from kvferry.select.sight import Budget, Sight


@dataclass(frozen=True, repr=False)
class LayerSelector(Selector):
    """Keeps the layers of `wanted`, or under a budget as many of them, from the first, as there is room for."""

    @abstractmethod
    def wanted(self, sight: Sight) -> list[int]:
        """The layers to send, the most wanted first; one at least."""

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held, layers = self.eligible(sight), self.wanted(sight)
        return _of(layers, held) if budget is None else _within(layers, held, budget)


@dataclass(frozen=True, repr=False)
class LayersByImportance(LayerSelector):
    """Keeps the `share` of layers, rounded up, that are most important; of equal ones the earlier."""

    share: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadSpec(f"{self.name}(share={self.share})", cure="share is in (0, 1]")

    @abstractmethod
    def importance(self, sight: Sight) -> Float[Tensor, " layers"]:
        """How much each layer is wanted."""

    def wanted(self, sight: Sight) -> list[int]:
        importance = self.importance(sight)
        if bool(importance.isnan().any()):
            layer = int(importance.isnan().nonzero()[0])
            raise NotFinite(
                f"the importance of layer {layer} is NaN", cure="Check the model's dtype: fp16 overflows"
            )
        n_kept = ceil(self.share * len(importance) - 1e-9)
        return importance.sort(descending=True, stable=True).indices[:n_kept].tolist()


def _within(layers: list[int], held: Bool[Tensor, "layers slots"], budget: Budget) -> Plan:
    budget.require(_of(layers[:1], held))
    return _of(layers[: most(1, len(layers), lambda n: budget.fits(_of(layers[:n], held)))], held)


def _of(layers: list[int], held: Bool[Tensor, "layers slots"]) -> Plan:
    chosen = torch.zeros(len(held), dtype=torch.bool, device=held.device)
    chosen[layers] = True
    return Plan((held & chosen.unsqueeze(-1)).to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
