"""The greedy allocation of precision that others use, to show what becomes of it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Geometry, Plan
from kvferry.select.contract import TokenSelector
from kvferry.select.graded import Graded, in_classes
from kvferry.select.most import most
from kvferry.select.sight import Budget, Sight
from kvferry.select.table import SELECTORS


@dataclass(frozen=True, repr=False)
class RdGreedy(Graded):
    """Slots in order of `inner`'s scores, each in the first of `candidates` that there is still room for, else dropped.

    Caveat: room for the first candidate ends where hardly any is left for the next, so that one slot at most, the last,
    is coarser, and the choice is that of `inner` under the first alone. `lagrangian` weighs what each class costs and
    loses instead. What a plan takes is counted exactly, sets, classes and headers with it.

    >>> RdGreedy("vnorm", candidates="int6_int3").brief()
    'rd_greedy(candidates=int6_int3)'
    """

    name: ClassVar[str] = "rd_greedy"
    inner: str = "vnorm"
    candidates: str = "int8_int4"

    def __post_init__(self) -> None:
        self._classes()
        inner = self._selector()
        # What it looks at is what the selector inside looks at.
        object.__setattr__(self, "needs", inner.needs)
        object.__setattr__(self, "reads_question", inner.reads_question)

    def fitted(self) -> tuple[str, ...]:
        return self._selector().fitted()

    def require_sender(self, geometry: Geometry) -> None:
        self._selector().require_sender(geometry)

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held, (finest, *_) = self.eligible(sight), self._classes()
        if budget is None:
            return in_classes(held, torch.tensor([[finest]], device=held.device))
        n_slots = int(held.any(0).sum())
        n_fine = most(0, n_slots, lambda n: budget.fits(self._first(sight, n, finest)))
        plan = self._first(sight, n_fine, finest)
        for n_kept in range(n_fine + 1, n_slots + 1):
            longer = self._one_more(sight, plan, n_kept, budget)
            if longer is None:
                break
            plan = longer
        if not bool(plan.classes.any()):
            budget.require(self._first(sight, 1, self._classes()[-1]))
        return self.within(plan, budget)

    def _one_more(self, sight: Sight, plan: Plan, n_kept: int, budget: Budget) -> Plan | None:
        """The plan and its next slot, in the first candidate that there is room for."""
        for token_class in self._classes():
            more = self._first(sight, n_kept, token_class).classes.masked_fill(plan.classes > 0, 0)
            longer = Plan(plan.classes + more)
            if budget.fits(longer):
                return longer
        return None

    def _first(self, sight: Sight, n_kept: int, token_class: int) -> Plan:
        """The best `n_kept` slots, in a class."""
        if n_kept == 0:
            return in_classes(
                self.eligible(sight), torch.zeros(1, 1, dtype=torch.int64, device=sight.kv.device)
            )
        inner = replace(self._selector(), scope=self.scope, proportion=1e-9, min_tokens=n_kept)
        kept: Bool[Tensor, "layers slots"] = inner.plan(sight).classes[:, 0] > 0
        return in_classes(kept, torch.tensor([[token_class]], device=kept.device))

    def _classes(self) -> list[int]:
        return [self.class_of(scheme) for scheme in self.candidates.split("_")]

    def _selector(self) -> TokenSelector:
        inner = SELECTORS.parse(self.inner)
        if not isinstance(inner, TokenSelector):
            raise BadSpec(f"rd_greedy(inner={self.inner})", cure="Name a selector that scores slots")
        return inner
