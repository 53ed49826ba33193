"""The multiple-choice knapsack: one option for each unit, the least distortion within a number of bits.

A unit is whatever is decided alone (a slot, a layer), an option one way of sending it, not at all among them. What the
units cost and lose adds up. The line through two options of a unit has a slope, the distortion saved per bit; at one
slope for all units no bit would save more elsewhere (Shoham and Gersho 1988, Everett 1963). An option of infinite
distortion is not on offer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.select.pareto import Bound, best_by_front

Table = Float[Tensor, "units options"]
Choice = Int64[Tensor, " units"]


def totals(distortion: Table, bits: Table, choice: Choice) -> tuple[float, float]:
    """What a choice loses and what it takes, summed in float64."""
    of = choice.unsqueeze(1)
    lost, taken = (float(table.double().gather(1, of).sum()) for table in (distortion, bits))
    return lost, taken


def by_slope(distortion: Table, bits: Table, slope: float) -> Choice:
    """For each unit the option of least `distortion + slope * bits`, the first of equals.

    No other choice loses less at so many bits or fewer.

    >>> by_slope(torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[0.0, 4.0, 8.0]]), slope=1.0).tolist()
    [1]
    """
    return (distortion.double() + slope * bits.double()).argmin(1)


def convex_hull(distortion: Table, bits: Table) -> Bool[Tensor, "units options"]:
    """The options that are the only best one of their unit at some slope: the corners of its lower hull.

    Of equal options it is the first.

    >>> convex_hull(torch.tensor([[9.0, 6.0, 1.0, 2.0]]), torch.tensor([[0.0, 2.0, 4.0, 5.0]])).tolist()
    [[True, False, True, False]]
    """
    return torch.stack([_is_corner(distortion, bits, option) for option in range(bits.shape[1])], 1)


def _is_corner(distortion: Table, bits: Table, option: int) -> Bool[Tensor, " units"]:
    """Whether more is saved on the way to it, per bit, than beyond it."""
    saved, more = (distortion[:, option, None] - distortion).double(), (bits - bits[:, option, None]).double()
    offered = distortion.isfinite()
    slope = torch.where(offered & (more != 0), saved / more, 0.0)
    beyond = slope.masked_fill(more <= 0, 0.0).amax(1).clamp(min=0.0)
    until = slope.masked_fill((more >= 0) | ~offered, torch.inf).amin(1)
    better = offered & (more == 0) & (saved > 0)
    better[:, :option] |= ((more == 0) & (saved == 0))[:, :option]
    return offered[:, option] & (beyond < until) & ~better.any(1)


def within(distortion: Table, bits: Table, max_bits: float, max_work: int = 1 << 21) -> Choice:
    """A choice of least distortion among those of at most `max_bits`; `UsageError` if there is none.

    Exact where fronts of so many pairs in all (`max_work`) prove it: always with a few units, and with thousands if
    few of their options are still open once the dual bound has struck out the others. Beyond that the best of several
    completions, never worse than one option for all, nor than filling up from the most needed unit down.

    >>> d, b = torch.tensor([[9.0, 1.0, 0.0], [5.0, 4.0, 0.0]]), torch.tensor([[0.0, 4.0, 8.0]] * 2)
    >>> within(d, b, 12).tolist()
    [1, 2]
    """
    distortion, bits = _checked(distortion, bits)
    hull = _Hull.of(distortion, bits)
    least = float(bits.gather(1, hull.first.unsqueeze(1)).sum())
    if least > max_bits:
        cure = "Allow more bits, or offer cheaper options"
        raise UsageError(f"{max_bits:.6g} bits, the cheapest choice takes {least:.6g}", cure=cure)
    steep, slope = hull.within(max_bits, least)
    choices = [hull.first, *_filled(distortion, bits, steep, max_bits), *_uniform(distortion)]
    choices.append(_from_the_top(distortion, bits, hull.first, max_bits))
    best = _best(distortion, bits, choices, max_bits)
    known = totals(distortion, bits, best)[0]
    exact = best_by_front(distortion, bits, Bound(slope, max_bits, known), max_work)
    return best if exact is None else _best(distortion, bits, [best, exact], max_bits)


def _best(distortion: Table, bits: Table, choices: list[Choice], max_bits: float) -> Choice:
    lost = [totals(distortion, bits, choice) for choice in choices]
    return choices[min((loss, place) for place, (loss, taken) in enumerate(lost) if taken <= max_bits)[1]]


def _checked(distortion: Table, bits: Table) -> tuple[Table, Table]:
    if distortion.shape != bits.shape or distortion.ndim != 2 or not bool(bits.isfinite().all()):
        what = f"distortion {tuple(distortion.shape)}, bits {tuple(bits.shape)}"
        raise ShapeMismatch(what, cure="Give both of every option of every unit, and finite bits")
    if bool(distortion.isnan().any()) or not bool(distortion.isfinite().any(1).all()):
        raise UsageError("a distortion is NaN, or a unit has no option", cure="Offer each unit a finite one")
    return distortion.double(), bits.double()


@dataclass(frozen=True)
class _Hull:
    """The way of each unit along its hull, all steps of all units in order of slope, the steepest first."""

    first: Choice
    """The cheapest corner of each unit."""
    corners: Int64[Tensor, " corners"]
    """Options, unit by unit, by bits."""
    start: Int64[Tensor, " units"]
    """Where the corners of each unit begin."""
    unit: Int64[Tensor, " steps"]
    slope: Float[Tensor, " steps"]
    bits: Float[Tensor, " steps"]

    @classmethod
    def of(cls, distortion: Table, bits: Table) -> "_Hull":
        order = bits.argsort(dim=1, stable=True)
        unit, place = convex_hull(distortion, bits).gather(1, order).nonzero().unbind(1)
        corners = order[unit, place]
        cost, loss = bits[unit, corners], distortion[unit, corners]
        step = (unit[1:] == unit[:-1]).nonzero().flatten()
        slope = (loss[step] - loss[step + 1]) / (cost[step + 1] - cost[step])
        steepest = slope.argsort(dim=0, descending=True, stable=True)
        step, slope = step[steepest], slope[steepest]
        start = torch.searchsorted(unit, torch.arange(len(bits), device=bits.device))
        return cls(corners[start], corners, start, unit[step], slope, cost[step + 1] - cost[step])

    def within(self, max_bits: float, least: float) -> tuple[Choice, float]:
        """The steepest steps that fit, and the slope of the first that does not (0 if all do)."""
        taken = int((least + self.bits.cumsum(0) <= max_bits).sum())
        steps = torch.bincount(self.unit[:taken], minlength=len(self.first))
        slope = float(self.slope[taken]) if taken < len(self.slope) else 0.0
        return self.corners[self.start + steps], slope


def _uniform(distortion: Table) -> Iterator[Choice]:
    """One option for all, of those that every unit has."""
    for option in distortion.isfinite().all(0).nonzero().flatten():
        yield option.repeat(len(distortion))


def _filled(distortion: Table, bits: Table, start: Choice, max_bits: float) -> Iterator[Choice]:
    """A choice with what still fits: most saved per bit first, and most saved first; each unit moves once."""
    of = start.unsqueeze(1)
    saved, more = distortion.gather(1, of) - distortion, bits - bits.gather(1, of)
    left = max_bits - float(bits.gather(1, of).sum())
    unit, option = ((saved > 0) & (more <= left)).nonzero().unbind(1)
    saved, more = saved[unit, option], more[unit, option]
    free = torch.finfo(torch.float64).tiny
    for worth in (saved / more.clamp(min=free), saved):
        order = worth.argsort(dim=0, descending=True, stable=True)
        yield _moved(start, unit[order].tolist(), option[order].tolist(), more[order].tolist(), left)


def _moved(start: Choice, units: list[int], options: list[int], more: list[float], left: float) -> Choice:
    moves: dict[int, int] = {}
    for unit, option, cost in zip(units, options, more, strict=True):
        if unit not in moves and cost <= left:
            moves[unit], left = option, left - cost
    choice = start.clone()
    choice[list(moves)] = choice.new_tensor(list(moves.values()))
    return choice


def _from_the_top(distortion: Table, bits: Table, first: Choice, max_bits: float) -> Choice:
    """Units in order of what they lose at their cheapest: each the best option that leaves room for all others."""
    lost = distortion.gather(1, first.unsqueeze(1)).flatten()
    extra = bits - bits.gather(1, first.unsqueeze(1))
    left, moves = max_bits - float(bits.gather(1, first.unsqueeze(1)).sum()), {}
    needed = lost.argsort(dim=0, descending=True, stable=True)
    finest = distortion.argsort(dim=1, stable=True)
    rows = zip(needed.tolist(), finest[needed].tolist(), extra[needed].tolist(), strict=True)
    for unit, options, costs in rows:
        moves[unit] = next(option for option in options if costs[option] <= left)
        left -= costs[moves[unit]]
    choice = first.clone()
    choice[list(moves)] = first.new_tensor(list(moves.values()))
    return choice
