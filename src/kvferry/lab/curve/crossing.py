"""The bytes at which a curve reaches a quality, and whether another one needs fewer.

Rule 1: quality is made monotone in bytes first (isotonic regression, every cap alike), then read off between two
caps, linearly in the logarithm of bytes. A curve is never extended: below its first cap and above its last it has no
crossing.
Rule 2: two curves are compared by the ratio of their crossings over resampled seeds and items: the same draws for
both, twins together.
Rule 3: where the interval of the ratio holds 1, or a crossing lies outside in more than a fortieth of the draws, the
verdict is "undecided".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvferry.lab.curve.caps import Cap
from kvferry.lab.curve.ledger import Line
from kvferry.lab.curve.marks import Numbers
from kvferry.metrics.paired import Interval

MIN_CAPS = 8
"""Fewer points make no curve."""
N_DRAWS = 2000
BELOW, ABOVE = "below the first cap", "above the last cap"


@dataclass(frozen=True)
class Items:
    """Items of all seeds under the caps of one arm; twins (`block`) lie side by side."""

    n_bytes: NDArray[np.float64]
    score: NDArray[np.float64]
    weight: NDArray[np.float64]
    seeds: NDArray[np.int64]
    """Of the blocks; the others are sums over blocks, `[caps, blocks]`."""
    block: int


@dataclass(frozen=True)
class Crossing:
    """`n_bytes` is None where the curve does not cross, and `why` says so."""

    n_bytes: float | None
    ci95: Interval | None
    why: str = ""


@dataclass(frozen=True)
class Sampled:
    """A crossing, and those of the draws; not finite where a draw's curve does not cross."""

    crossing: Crossing
    drawn: NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Bytes of `a` over those of `b` at the same quality."""

    a: str
    b: str
    ratio: float | None
    ci95: Interval | None
    verdict: str


def items_of(lines: Sequence[tuple[Cap, int, Line]], block: int) -> Items:
    """Of (cap, seed, line); every seed must have the same caps, in one order."""
    caps = list(dict.fromkeys(cap for cap, _, _ in lines))
    rows = [[line for own, _, line in lines if own == cap] for cap in caps]

    def summed(values: Sequence[Numbers]) -> Numbers:
        return np.concatenate(values).reshape(-1, block).sum(1)

    sizes = [line.outcome.n // block for line in rows[0]]
    return Items(
        n_bytes=np.stack(
            [summed([line.outcome.charged(cap) for line in row]) for cap, row in zip(caps, rows, strict=True)]
        ),
        score=np.stack([summed([np.array(line.outcome.score) for line in row]) for row in rows]),
        weight=np.stack([summed([np.array(line.outcome.weight) for line in row]) for row in rows]),
        seeds=np.repeat([line.point.seed for line in rows[0]], sizes),
        block=block,
    )


def sampled(items: Items, target: float, *, seed: int = 0) -> Sampled:
    """Where the mean curve reaches `target`, and where those of the draws do."""
    if len(items.score) < MIN_CAPS:
        why = f"{len(items.score)} caps, {MIN_CAPS} are needed"
        return Sampled(Crossing(None, None, why), np.full(N_DRAWS, np.nan))
    (found,) = _crossings(items, np.ones((1, len(items.seeds))), target)
    drawn = _crossings(items, draws(items.seeds, seed), target)
    if not np.isfinite(found):
        return Sampled(Crossing(None, None, ABOVE if found > 0 else BELOW), drawn)
    return Sampled(Crossing(float(found), _interval(drawn)), drawn)


def ratio(a: str, one: Sampled, b: str, other: Sampled) -> Ratio:
    """The ratio of two crossings, paired."""
    first, second = one.crossing.n_bytes, other.crossing.n_bytes
    if first is None or second is None:
        return Ratio(a, b, None, None, "undecided")
    with np.errstate(invalid="ignore"):
        ci95 = _interval(one.drawn / other.drawn)
    return Ratio(a, b, first / second, ci95, _verdict(ci95))


def draws(seeds: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """How often each block comes in each draw: seeds with replacement, then the blocks of each."""
    rng, labels = np.random.default_rng(seed), np.unique(seeds)
    counts = np.zeros((N_DRAWS, len(seeds)))
    chosen = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=N_DRAWS)
    for label, times in zip(labels, chosen.T, strict=True):
        blocks = np.flatnonzero(seeds == label)
        share = np.full(len(blocks), 1 / len(blocks))
        for draw in np.flatnonzero(times):
            counts[draw, blocks] = rng.multinomial(times[draw] * len(blocks), share)
    return counts


def read_off(n_bytes: ArrayLike, quality: ArrayLike, target: float) -> Numbers:
    """Bytes at `target`, curve by curve; infinity above the last point, minus infinity below the first.

    >>> read_off([[100, 1000, 10_000]], [[0.0, 0.8, 1.0]], 0.9).round().tolist()
    [3162.0]
    """
    sizes, qualities = np.asarray(n_bytes, float), np.asarray(quality, float)
    order = sizes.argsort(1, kind="stable")
    x = np.log(np.take_along_axis(sizes, order, 1))
    y = isotonic(np.take_along_axis(qualities, order, 1))
    above = (y < target).sum(1)
    right = above.clip(1, y.shape[1] - 1)[:, None]
    (x0, x1), (y0, y1) = ([np.take_along_axis(z, at, 1)[:, 0] for at in (right - 1, right)] for z in (x, y))
    inside = (above > 0) & (above < y.shape[1])
    share = (target - y0) / np.where(inside, y1 - y0, np.inf)
    found = np.exp(x0 + share * (x1 - x0))
    return np.where(inside, found, np.where(above == 0, -np.inf, np.inf))


def isotonic(values: ArrayLike) -> Numbers:
    """The nearest rows that never fall: at each place the largest over all starts of the least mean from there on.

    >>> isotonic([[1.0, 3.0, 2.0, 4.0]]).tolist()
    [[1.0, 2.5, 2.5, 4.0]]
    """
    y = np.asarray(values, float)
    places = np.arange(y.shape[1])
    sums = np.concatenate([np.zeros((len(y), 1)), y.cumsum(1)], 1)
    totals = sums[:, None, 1:] - sums[:, :-1, None]
    lengths = places[None, :] - places[:, None] + 1
    means = np.where(lengths > 0, totals / lengths.clip(1), np.inf)
    least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    return np.where(lengths > 0, least, -np.inf).max(1)


def _crossings(items: Items, counts: NDArray[np.float64], target: float) -> Numbers:
    """Of each draw."""
    n_items = counts.sum(1) * items.block
    n_bytes = (counts @ items.n_bytes.T) / n_items[:, None]
    quality = (counts @ items.score.T) / (counts @ items.weight.T)
    return read_off(n_bytes, quality, target)


def _interval(values: Numbers) -> Interval | None:
    """95 %; None where too many draws have no number."""
    known = values[np.isfinite(values)]
    if len(known) < 0.975 * len(values):
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _verdict(ci95: Interval | None) -> str:
    if ci95 is None or ci95[0] <= 1 <= ci95[1]:
        return "undecided"
    return "fewer bytes" if ci95[1] < 1 else "more bytes"
