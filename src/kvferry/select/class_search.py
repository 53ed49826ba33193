"""The plan of least loss within so many bits: a row of classes that all layers share, and a move for each of them.

Row and moves are improved in turn at one slope, the slope is halved in until the bits suffice, and the row is completed
by the knapsack.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.kv import Plan
from kvferry.select.class_table import ClassTable, Moves
from kvferry.select.knapsack import by_slope, totals, within

_ROUNDS = 2
"""Turns of row and moves at one slope; a third changed no plan that was tried."""
_HALVINGS = 16
_STEEPEST = 40.0
"""Slopes lie within 2**-40 to 2**40, and are found to a thousandth of an octave."""
_FEW_MOVES = 64
_ROOM = 1e-9
"""Bits below which there is nothing to choose."""
_OPEN_WORK = 1 << 16
"""Pairs that the knapsack may compare for a proof: some milliseconds."""


@dataclass(frozen=True)
class Solved:
    """A plan, and what it loses and takes by the menu."""

    plan: Plan
    lost: float
    bits: float


def solved(table: ClassTable, max_bits: float) -> Solved:
    """The best that was found; it takes more than `max_bits` only where nothing takes less."""
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        choice, moves = _at_slope(table, 2.0**middle)
        taken = float(table.options(moves)[1].gather(1, choice.unsqueeze(1)).sum())
        low, high = (middle, high) if taken > max_bits else (low, middle)
    choice, moves = _at_slope(table, 2.0**high)
    found = [_completed(table, choice, one, max_bits) for one in _moves_to_try(table, moves)]
    return min(found, key=lambda one: (one.bits > max_bits, one.lost))


def _at_slope(table: ClassTable, slope: float) -> tuple[Int[Tensor, " slots"], Moves]:
    start = (table.lost + slope * table.bits).sum(-1).argmin(0)
    moves = start - start.min()
    choice = by_slope(*table.options(moves), slope)
    for _ in range(_ROUNDS):
        moves = table.best_moves(choice, slope)
        choice = by_slope(*table.options(moves), slope)
    return choice, moves


def _moves_to_try(table: ClassTable, moves: Moves) -> list[Moves]:
    """All there are, if they are few: then the best of the structure is found. Else these, and none at all."""
    n, n_rows = len(table.classes), moves.numel()
    if n**n_rows > _FEW_MOVES:
        return [moves, torch.zeros_like(moves)]
    every = itertools.product(range(n), repeat=n_rows)
    return [torch.tensor(one, device=moves.device).view_as(moves) for one in every]


def _completed(table: ClassTable, choice: Int[Tensor, " slots"], moves: Moves, max_bits: float) -> Solved:
    """The best row for these moves within the bits."""
    lost, bits = table.options(moves)
    least = bits.masked_fill(~lost.isfinite(), torch.inf).amin(1).double().sum()
    if max_bits >= max(float(least), _ROOM):
        choice = within(lost, bits, max_bits, _OPEN_WORK)
    total, taken = totals(lost, bits, choice)
    return Solved(table.plan(choice, moves), total, taken)
