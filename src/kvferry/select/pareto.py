"""The exact knapsack, where it can be had: fronts of choices none of which another beats, merged unit by unit.

First the dual bound strikes out the options that no better choice than the known one can contain, which leaves most
units of a large instance with a single one (Pisinger 1995 calls the others the core).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Bound:
    """A slope, the bits there are, and the least distortion that is known to be possible with them."""

    slope: float
    max_bits: float
    known: float


@dataclass(frozen=True)
class _Front:
    """Choices for the units so far, by bits; each loses less than all that take fewer."""

    bits: Float[Tensor, " choices"]
    loss: Float[Tensor, " choices"]
    excess: Float[Tensor, " choices"]
    """How far loss + slope * bits lies above its least."""


def best_by_front(
    distortion: Float[Tensor, "units options"],
    bits: Float[Tensor, "units options"],
    bound: Bound,
    max_work: int,
) -> Int64[Tensor, " units"] | None:
    """The best choice within the bits; None if the known one is as good, or if it takes more than `max_work` pairs.

    >>> d, b = torch.tensor([[9.0, 0.0], [8.0, 0.0]]).double(), torch.tensor([[0.0, 5.0], [0.0, 4.0]]).double()
    >>> best_by_front(d, b, Bound(slope=2.0, max_bits=5, known=9.0), 100).tolist()
    [1, 0]
    """
    price = distortion + bound.slope * bits
    floor = price.amin(1, keepdim=True)
    slack = bound.known - (float(floor.sum()) - bound.slope * bound.max_bits)
    slack += _ROUNDING * (abs(bound.known) + float(floor.abs().sum()) + bound.slope * abs(bound.max_bits))
    excess = price - floor
    choice, core = price.argmin(1), ((excess <= slack).sum(1) > 1).nonzero().flatten()
    spent = bits.gather(1, choice.unsqueeze(1)).flatten().index_fill(0, core, 0.0)
    # Fronts are many small steps, which a processor takes faster than a device.
    table = torch.stack([part[core] for part in (bits, distortion, excess)], 1).cpu()
    places = [(row[2] <= slack).nonzero().flatten() for row in table]
    offers = [row[:, place] for row, place in zip(table, places, strict=True)]
    found = _merge(offers, bound.max_bits - float(spent.sum()), slack, max_work)
    if found is None:
        return None
    taken = [int(place[option]) for place, option in zip(places, found, strict=True)]
    choice[core] = torch.tensor(taken, dtype=torch.int64, device=choice.device)
    return choice


def _merge(offers: list[Float[Tensor, "3 _"]], room: float, slack: float, max_work: int) -> list[int] | None:
    """For each offer (bits, loss, excess by option) which option the best choice takes."""
    least = torch.tensor([float(offer[0].min()) for offer in offers], dtype=torch.float64)
    rest = least.sum() - least.cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64)
    front, trail, work = _Front(zero, zero, zero), [], 0
    for (cost, loss, excess), later in zip(offers, rest.tolist(), strict=True):
        work += len(front.bits) * len(cost)
        if work > max_work:
            return None
        sums = [(a.unsqueeze(1) + b).flatten() for a, b in ((front.bits, cost), (front.loss, loss))]
        over = (front.excess.unsqueeze(1) + excess).flatten()
        held = _undominated(sums[0], sums[1], (sums[0] + later <= room) & (over <= slack))
        if not len(held):
            return None
        front = _Front(sums[0][held], sums[1][held], over[held])
        trail.append((held // len(cost), held % len(cost)))
    return _walk_back(trail)


def _undominated(
    bits: Float[Tensor, " pairs"], loss: Float[Tensor, " pairs"], allowed: Tensor
) -> Int64[Tensor, " choices"]:
    """Which of the allowed pairs lose less than all that take as many bits or fewer, by bits."""
    index = allowed.nonzero().flatten()
    index = index[loss[index].argsort(dim=0, stable=True)]
    index = index[bits[index].argsort(dim=0, stable=True)]
    sorted_loss = loss[index]
    before = sorted_loss.cummin(0).values.roll(1) if len(index) else sorted_loss
    before[:1] = torch.inf
    return index[sorted_loss < before]


def _walk_back(trail: list[tuple[Tensor, Tensor]]) -> list[int]:
    """From the last choice of the last front, which loses least, to the options that made it."""
    at, places = -1, []
    for parents, options in reversed(trail):
        places.append(int(options[at]))
        at = int(parents[at])
    return places[::-1]
