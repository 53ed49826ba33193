"""Selectors that say how finely, by names of schemes of the codec `mixed`, whose places are the precision classes."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvferry.errors import UnknownName, UsageError
from kvferry.kv import Plan
from kvferry.select.contract import Selector
from kvferry.select.sight import Budget
from kvferry.spec import Method


@dataclass(frozen=True, repr=False)
class Graded(Selector):
    """`schemes` is the option of that name of the codec that will be used, from fine to coarse, joined by `_`."""

    schemes: str = field(default="fp16_int8_int6_int4_int3_int2", kw_only=True)

    def class_of(self, scheme: str) -> int:
        """The precision class of a scheme; `UnknownName` for one that the codec does not have."""
        names = self.schemes.split("_")
        if scheme not in names:
            raise UnknownName("scheme", scheme, names)
        return names.index(scheme) + 1

    def require_codec(self, codec: Method) -> None:
        """Raise `UsageError` unless the codec means by each class what this selector means."""
        if codec.config().get("schemes") != self.schemes:
            cure = f"Use mixed(schemes={self.schemes}), or give the selector the schemes of the codec"
            raise UsageError(f"{self.brief()} names schemes that {codec.brief()} does not have so", cure=cure)

    def within(self, plan: Plan, budget: Budget | None) -> Plan:
        """The plan, if there is room for it; `BudgetTooSmall` otherwise."""
        if budget is None:
            return plan
        if budget.offer is None:
            cure = f"Use mixed(schemes={self.schemes}), or a selector that only keeps and drops"
            raise UsageError("this codec has no precision classes to choose from", cure=cure)
        budget.require(plan)
        return plan


def in_classes(held: Bool[Tensor, "layers slots"], classes: Int[Tensor, "#layers #slots"]) -> Plan:
    """The slots held, keys and values in the same class."""
    return Plan((held * classes).to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
