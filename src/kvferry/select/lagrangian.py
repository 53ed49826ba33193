"""The rate-distortion allocation with a fitted importance, or with none."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import Geometry, Menu
from kvferry.select.allocation import Allocation
from kvferry.select.importance import IMPORTANCES
from kvferry.select.sight import Sight

EVEN = "even"


@dataclass(frozen=True, repr=False)
class Lagrangian(Allocation):
    """Least measured loss under the cap, jointly over layers, K and V, and slots. See `kvferry.select.allocation`.

    `importance` is the folder of one that was fitted for the sender and its receiver (`kvferry fit-importance`), which
    says what an error in a slot does to the receiver's answers; `even` counts all errors alike, in the codec's measure.
    Without `drops` every slot is sent, the least important ones at steps that leave little more than their mean: for
    aligners, which miss a slot more than its content.

    >>> Lagrangian()
    lagrangian(importance=even, scope=all_context, drops=True)
    """

    name: ClassVar[str] = "lagrangian"
    importance: str = EVEN

    def fitted(self) -> tuple[str, ...]:
        return () if self.importance == EVEN else (IMPORTANCES.digest(self.importance),)

    def require_sender(self, geometry: Geometry) -> None:
        if self.importance != EVEN:
            IMPORTANCES.load(self.importance, geometry)

    def counts(self, sight: Sight, menu: Menu) -> Float[Tensor, "layers 2 slots"]:
        kv = sight.kv
        if self.importance == EVEN:
            return torch.ones(kv.geometry.n_layers, 2, kv.n_tokens, device=kv.device)
        # A uniform step's error grows with its square, so a loss counts by the square of what its step should be.
        of_slots = 4.0 ** -IMPORTANCES.load(self.importance, kv.geometry, kv.device)(kv)[0]
        return of_slots.expand(kv.geometry.n_layers, 2, -1)
