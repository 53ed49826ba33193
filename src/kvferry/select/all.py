"""Every slot in scope: no selection at all."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvferry.kv import Plan
from kvferry.select.contract import Selector
from kvferry.select.sight import Budget, Sight


@dataclass(frozen=True, repr=False)
class All(Selector):
    """The whole scope in class 1, or `BudgetTooSmall`: what a codec alone does with a cap.

    >>> All()
    all(scope=all_context)
    """

    name: ClassVar[str] = "all"

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        plan = Plan(self.eligible(sight).to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
        if budget is not None:
            budget.require(plan)
        return plan
