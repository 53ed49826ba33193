"""Precision by rate and distortion: which slots to drop and how finely to send the others, under an exact cap.

The codec's menu says what each class of each slot costs and loses; an importance says how much a loss counts. What is
lost plus lambda times what it costs is least, slot by slot, where no byte would save more elsewhere (Shoham and Gersho
1988). All layers share one row of classes, each moved by a number of its own, so that a message says the row once. Sets
and classes cost bytes too: plans with fewer classes are tried beside, and what each takes for them is asked of the
codec.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.kv import Menu, Plan
from kvferry.select.class_search import Solved, solved
from kvferry.select.class_table import ClassTable, PerSlot
from kvferry.select.contract import Selector
from kvferry.select.most import most
from kvferry.select.sight import Budget, Sight

_GRAINS = (1, 2, 4)
"""Tables with all classes, every second, every fourth: fewer classes have shorter sets."""
_SOLVES = 3
"""Times that the bytes of headers and sets are guessed anew from the plan before."""
_NEARLY = 2
"""Bytes by which a plan may stay under its cap and still count as found."""
_SET_BYTES = 2
"""At least, for the set of a class that not all slots are in."""


@dataclass(frozen=True, repr=False)
class Allocation(Selector):
    """Chooses classes by a menu and what losses count. Without a budget everything is sent in class 1."""

    drops: bool = field(default=True, kw_only=True)
    """Whether a slot may be left out."""

    @abstractmethod
    def counts(self, sight: Sight, menu: Menu) -> PerSlot:
        """What a squared error of 1 on the menu counts, for the keys and the values of each slot."""

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held = self.eligible(sight)
        whole = Plan(held.to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
        if budget is None:
            return whole
        if budget.offer is None:
            cure = "Hand in a budget with the codec's offer (codec.menu)"
            raise UsageError(f"{self.brief()} chooses precision classes, and none are offered", cure=cure)
        menu = budget.offer()
        table = ClassTable.of(sight.kv, menu, self.counts(sight, menu), held)
        return _fitted(table if self.drops else table.without_dropping(), whole, budget)


def _fitted(table: ClassTable, whole: Plan, budget: Budget) -> Plan:
    """The plan of least loss within the budget, of those with more and with fewer classes."""
    start = _overhead(table, float(table.bits[0].sum()), budget.cost(whole))
    found = [_within(table.thinned(grain), start, budget) for grain in _GRAINS]
    found.append(_one_class(table, whole, start, budget))
    fitting = [one for one in found if one is not None and bool(one.plan.classes.any())]
    return min(fitting, key=lambda one: one.lost).plan if fitting else _coarsest(table, whole, budget)


def _overhead(table: ClassTable, n_bits: float, n_bytes: int) -> int:
    """The bytes of headers, sets and classes, of a plan that costs so many and whose numbers take so many bits.

    Where a step is chosen afterwards a plan's cost is that of headers and sets: its numbers take what is left.
    """
    return n_bytes - (0 if table.stepped else int(n_bits // 8))


def _within(table: ClassTable, overhead: int, budget: Budget) -> Solved | None:
    """What sets and headers take is found out by asking; None where it does not come to rest."""
    for _ in range(_SOLVES):
        one = solved(table, 8.0 * (budget.max_bytes - overhead))
        n_bytes = budget.cost(one.plan)
        needed = _overhead(table, one.bits, n_bytes)
        if needed <= overhead + _NEARLY and n_bytes <= budget.max_bytes:
            return one
        overhead = max(needed, overhead + 1)
    return None


def _one_class(table: ClassTable, whole: Plan, overhead: int, budget: Budget) -> Solved | None:
    """All slots in one class or dropped: nothing but their number, and the step or the class, is chosen."""
    max_bits = 8.0 * (budget.max_bytes - overhead - _SET_BYTES)
    lost, bits = (part.sum((1, 2)) for part in (table.lost, table.bits))
    pairs = zip(lost, bits, strict=True)
    kept = torch.stack([_affordable(table.dropped - one, cost, max_bits) for one, cost in pairs])
    losses = torch.where(kept, lost, table.dropped).sum(-1)
    best = int(losses.argmin())
    # A step makes one class as good as another.
    token_class = 1 if table.stepped else int(table.classes[best])
    plan = Plan(torch.where(kept[best] & table.held.unsqueeze(1), whole.classes * token_class, 0))
    taken = float(bits[best][kept[best]].sum())
    fits = bool(kept[best].any()) and bool(losses[best].isfinite()) and budget.fits(plan)
    return Solved(plan, float(losses[best]), taken) if fits else None


def _affordable(
    saved: Float[Tensor, " slots"], bits: Float[Tensor, " slots"], max_bits: float
) -> Bool[Tensor, " slots"]:
    """The slots that save most per bit, as many as there are bits for."""
    rate = saved / bits.clamp(min=1e-9)
    order = rate.argsort(dim=0, descending=True, stable=True)
    fits = (bits[order].cumsum(0) <= max_bits) & (rate[order] > 0)
    return torch.zeros_like(fits).scatter(0, order, fits)


def _coarsest(table: ClassTable, whole: Plan, budget: Budget) -> Plan:
    """Slots of least loss dropped until the rest fits at its coarsest; the last resort at very small caps."""
    whole = Plan(whole.classes * (1 if table.stepped else int(table.classes[-1])))
    order = table.dropped.masked_fill(~table.held.any(0), -torch.inf)
    order = order.argsort(dim=0, descending=True, stable=True)
    n_held = int(table.held.any(0).sum())
    least = 1 if bool(table.dropped.isfinite().all()) else n_held
    budget.require(_only(whole, order[:least]))
    n_kept = most(least, n_held, lambda n: budget.fits(_only(whole, order[:n])))
    return _only(whole, order[:n_kept])


def _only(whole: Plan, slots: Int[Tensor, " kept"]) -> Plan:
    classes = torch.zeros_like(whole.classes)
    classes[..., slots] = whole.classes[..., slots]
    return Plan(classes)
