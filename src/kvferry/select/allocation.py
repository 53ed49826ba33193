"""Precision by rate and distortion: which slots to drop and how finely to send the others, under an exact cap.

The codec's menu says what each class of each slot costs and loses; a worth says how much a loss counts. What is lost
plus lambda times what it costs is least, slot by slot, where no byte would save more elsewhere (Shoham and Gersho
1988). All layers share one row of classes, each moved by a number of its own, so that a message says the row once; row
and moves are improved in turn. Sets and classes cost bytes too: plans with fewer classes are tried beside, and what
each takes for them is asked of the codec.
"""

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import BudgetTooSmall, NotFinite, UsageError
from kvferry.kv import KV, Menu, Plan
from kvferry.select.contract import Selector
from kvferry.select.knapsack import by_slope, totals, within
from kvferry.select.sight import Budget, Sight

_ROUNDS = 2
_SOLVES = 3
_HALVINGS = 16
_STEEPEST = 40.0
_GRAINS = (1, 2, 4)
_FEW_MOVES = 64
_SET_BYTES = 2
_OPEN_WORK = 1 << 16

PerSlot = Float[Tensor, "layers 2 slots"]


@dataclass(frozen=True, repr=False)
class Allocation(Selector):
    """Chooses classes by a menu and what losses are worth. Without a budget everything is sent in class 1."""

    @abstractmethod
    def counts(self, sight: Sight, menu: Menu) -> PerSlot:
        """What a squared error of 1 on the menu counts, for the keys and the values of each slot."""

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held = self.eligible(sight)
        whole = Plan(held.to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
        if budget is None:
            return whole
        if budget.offer is None:
            cure = "Use a codec with precision classes (ecsq, mixed), or a selector of tokens"
            raise UsageError("this codec has no precision classes to choose from", cure=cure)
        menu = budget.offer()
        return _fitted(_Table.of(sight.kv, menu, self.counts(sight, menu), held), whole, budget)


@dataclass(frozen=True)
class _Table:
    """Losses and bits of every class of every slot, layer by layer, and which slots may be sent."""

    classes: Int[Tensor, " classes"]
    lost: Float[Tensor, "classes layers 2 slots"]
    bits: Float[Tensor, "classes layers 2 slots"]
    dropped: Float[Tensor, " slots"]
    """What is lost of a slot that is not sent: all in which it is unlike the mean slot."""
    held: Bool[Tensor, "layers slots"]
    stepped: bool
    """A step will be chosen after the classes; otherwise classes decide what the numbers take."""

    @classmethod
    def of(cls, kv: KV, menu: Menu, counts: PerSlot, held: Bool[Tensor, "layers slots"]) -> "_Table":
        if not bool(counts.isfinite().all()):
            raise NotFinite("a worth is NaN or infinite", cure="Check the model's dtype: fp16 overflows")
        lost, bits = (torch.stack([x.sum(2) for x in each], 1) for each in (menu.error, menu.bits))
        unlike = _unlike(kv, menu)
        if not menu.units:
            # Without steps nothing says how layers compare: each counts by its own deviation.
            spread = unlike.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            counts = counts / spread
        here = held[None, :, None]
        lost, bits = (lost * counts).masked_fill(~here, 0.0), bits.masked_fill(~here, 0.0)
        dropped = (unlike * counts).masked_fill(~held.unsqueeze(1), 0.0).sum((0, 1))
        return cls(
            torch.tensor(menu.classes, device=held.device), lost, bits, dropped, held, bool(menu.units)
        )

    def thinned(self, grain: int) -> "_Table":
        """With every so many classes only: what is saved in sets of tokens may be worth more than fine choices."""
        return replace(self, classes=self.classes[::grain], lost=self.lost[::grain], bits=self.bits[::grain])

    def options(self, moves: Int[Tensor, "layers 2"]) -> tuple[Tensor, Tensor]:
        """Losses and bits `[slots, 1 + classes]` of each slot: dropped, or sent in each class moved by its rows."""
        row = self._row(moves)
        lost, bits = (self._moved(table, row) for table in (self.lost, self.bits))
        dropped = self.dropped.unsqueeze(1)
        return torch.cat([dropped, lost], 1), torch.cat([torch.zeros_like(dropped), bits], 1)

    def best_moves(self, choice: Int[Tensor, " slots"], slope: float) -> Int[Tensor, "layers 2"]:
        """For each row the move that is best for these classes of the slots."""
        n = len(self.classes)
        total = (self.lost + slope * self.bits).masked_fill(choice == 0, 0.0)
        moves = torch.arange(n, device=choice.device).unsqueeze(1)
        index = (choice.clamp(min=1) - 1 + moves).clamp(max=n - 1)
        return total.gather(0, index[:, None, None].expand_as(total)).sum(-1).argmin(0)

    def plan(self, choice: Int[Tensor, " slots"], moves: Int[Tensor, "layers 2"]) -> Plan:
        """The classes of a choice among `options`."""
        row = (choice.clamp(min=1) - 1).expand(*moves.shape, -1) + moves.unsqueeze(-1)
        classes = self.classes[row.clamp(max=len(self.classes) - 1)]
        kept = (choice > 0) & self.held.unsqueeze(1)
        return Plan(torch.where(kept, classes, 0).to(torch.uint8))

    def _row(self, moves: Int[Tensor, "layers 2"]) -> Int[Tensor, "classes layers 2"]:
        n = len(self.classes)
        return (torch.arange(n, device=moves.device)[:, None, None] + moves).clamp(max=n - 1)

    def _moved(self, table: Tensor, row: Int[Tensor, "classes layers 2"]) -> Float[Tensor, "slots classes"]:
        return table.gather(0, row.unsqueeze(-1).expand_as(table)).sum((1, 2)).T


@dataclass(frozen=True)
class _Solved:
    """A plan, and what it loses by the menu."""

    plan: Plan
    lost: float
    bits: float

    def overhead(self, budget: Budget, stepped: bool) -> int:
        """The bytes of headers, sets and classes."""
        return budget.cost(self.plan) - (0 if stepped else math.floor(self.bits / 8))


def _fitted(table: _Table, whole: Plan, budget: Budget) -> Plan:
    """The plan of least loss within the budget, of those with more and with fewer classes."""
    bits = float(table.bits[0].sum())
    start = _Solved(whole, 0.0, bits).overhead(budget, table.stepped)
    found = [_within(table.thinned(grain), start, budget) for grain in _GRAINS]
    found.append(_one_class(table, whole, start, budget))
    solved = [one for one in found if one is not None and bool(one.plan.classes.any())]
    return min(solved, key=lambda one: one.lost).plan if solved else _dropped(table, whole, budget)


def _within(table: _Table, overhead: int, budget: Budget) -> _Solved | None:
    """What sets and headers take is found out by asking; None where it does not come to rest."""
    for _ in range(_SOLVES):
        solved = _solved(table, 8.0 * (budget.max_bytes - overhead))
        needed = solved.overhead(budget, table.stepped)
        if needed <= overhead + 2 and budget.cost(solved.plan) <= budget.max_bytes:
            return solved
        overhead = max(needed, overhead + 1)
    return None


def _one_class(table: _Table, whole: Plan, overhead: int, budget: Budget) -> _Solved | None:
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
    fits = bool(kept[best].any()) and budget.cost(plan) <= budget.max_bytes
    taken = float(bits[best][kept[best]].sum())
    return _Solved(plan, float(losses[best]), taken) if fits else None


def _affordable(
    saved: Float[Tensor, " slots"], bits: Float[Tensor, " slots"], max_bits: float
) -> Bool[Tensor, " slots"]:
    """The slots that save most per bit, as many as there are bits for."""
    worth = saved / bits.clamp(min=1e-9)
    order = worth.argsort(dim=0, descending=True, stable=True)
    fits = (bits[order].cumsum(0) <= max_bits) & (worth[order] > 0)
    return torch.zeros_like(fits).scatter(0, order, fits)


def _solved(table: _Table, max_bits: float) -> _Solved:
    """Row and moves in turn at one slope, the slope at which the bits suffice."""
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        choice, moves = _at_slope(table, 2.0**middle)
        taken = float(table.options(moves)[1].gather(1, choice.unsqueeze(1)).sum())
        low, high = (middle, high) if taken > max_bits else (low, middle)
    choice, moves = _at_slope(table, 2.0**high)
    found = [_completed(table, choice, one, max_bits) for one in _moves_to_try(table, moves)]
    return min(found, key=lambda one: (one.bits > max_bits, one.lost))


def _moves_to_try(table: _Table, moves: Int[Tensor, "layers 2"]) -> list[Int[Tensor, "layers 2"]]:
    """All there are, if they are few: then the best of the structure is found. Else these, and none at all."""
    n, n_rows = len(table.classes), moves.numel()
    if n**n_rows > _FEW_MOVES:
        return [moves, torch.zeros_like(moves)]
    every = itertools.product(range(n), repeat=n_rows)
    return [torch.tensor(one, device=moves.device).view_as(moves) for one in every]


def _completed(
    table: _Table, choice: Int[Tensor, " slots"], moves: Int[Tensor, "layers 2"], max_bits: float
) -> _Solved:
    """The best row for these moves within the bits."""
    lost, bits = table.options(moves)
    if max_bits > 0:
        choice = within(lost, bits, max_bits, _OPEN_WORK)
    total, taken = totals(lost, bits, choice)
    return _Solved(table.plan(choice, moves), total, taken)


def _at_slope(table: _Table, slope: float) -> tuple[Int[Tensor, " slots"], Int[Tensor, "layers 2"]]:
    start = (table.lost + slope * table.bits).sum(-1).argmin(0)
    moves = start - start.min()
    choice = by_slope(*table.options(moves), slope)
    for _ in range(_ROUNDS):
        moves = table.best_moves(choice, slope)
        choice = by_slope(*table.options(moves), slope)
    return choice, moves


def _unlike(kv: KV, menu: Menu) -> PerSlot:
    """Squared distance of each slot from the mean one, in the menu's units."""
    found = []
    for layer in range(kv.geometry.n_layers):
        held = kv.present[layer, 0][:, None]
        for which, numbers in enumerate(kv.layer(layer)):
            own = numbers[0].float()
            mean = (own * held).sum(1, keepdim=True) / held.sum().clamp(min=1)
            unit = menu.units[layer][which].unsqueeze(1) if menu.units else 1.0
            found.append(((own - mean) / unit).square().sum((0, 2)))
    return torch.stack(found).unflatten(0, (-1, 2))


def _dropped(table: _Table, whole: Plan, budget: Budget) -> Plan:
    """Slots of least loss dropped until the rest fits at its coarsest; the last resort at very small caps."""
    coarsest = 1 if table.stepped else int(table.classes[-1])
    whole = Plan(whole.classes * coarsest)
    order = table.dropped.masked_fill(~table.held.any(0), -torch.inf)
    order = order.argsort(dim=0, descending=True, stable=True)
    n_held = int(table.held.any(0).sum())
    low, high = 1, n_held
    if (needed := budget.cost(_kept(whole, order[:1]))) > budget.max_bytes:
        raise BudgetTooSmall(budget.max_bytes, needed)
    while low < high:
        middle = (low + high + 1) // 2
        fits = budget.cost(_kept(whole, order[:middle])) <= budget.max_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return _kept(whole, order[:low])


def _kept(whole: Plan, slots: Int[Tensor, " kept"]) -> Plan:
    classes = torch.zeros_like(whole.classes)
    classes[..., slots] = whole.classes[..., slots]
    return Plan(classes)
