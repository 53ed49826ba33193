"""Two ways to answer the same items: how much better is one, and could that be chance?

Rule 1: a comparison is paired, item by item; two accuracies side by side prove nothing.
Rule 2: where the interval of the difference holds zero the verdict is "undecided", whatever p says.
Rule 3: items that belong together (twins) are resampled together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvferry.errors import MissingExtra, UsageError

Interval = tuple[float, float]
Verdict = Literal["a better", "b better", "undecided"]

N_DRAWS = 10_000
_Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Paired:
    """Mean of `a - b`, its bootstrap 95 % interval, McNemar's exact p (None where scores are not 0 or 1)."""

    difference: float
    ci95: Interval
    p: float | None
    verdict: Verdict


def paired(a: ArrayLike, b: ArrayLike, *, block: int = 1, seed: int = 0) -> Paired:
    """Compare two scores of the same items; `block` consecutive items belong together.

    >>> paired([1, 1, 1, 1], [0, 0, 0, 0]).verdict
    'a better'
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    _check(first, second, block)
    ci95 = bootstrap_mean((first - second).reshape(-1, block).mean(-1), seed=seed)
    p = mcnemar(first, second) if _binary(first) and _binary(second) else None
    return Paired(float((first - second).mean()) + 0.0, ci95, p, _verdict(ci95))


def clustered(a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, block: int = 1, seed: int = 0) -> Paired:
    """`paired` for items that come in clusters: seeds of a training, each with items of its own.

    Clusters are drawn with replacement, then blocks of items within each. Clusters of few are known too well: with
    three the interval is hardly wider than from the least to the most of them. McNemar's p would take items of a
    cluster for independent ones, so there is none. Raises `UsageError` for scores that do not pair up.

    >>> clustered([1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]).difference
    0.75
    """
    first, second, labels = np.asarray(a, float), np.asarray(b, float), np.asarray(clusters)
    _check(first, second, block)
    if labels.shape != first.shape:
        cure = "Give the cluster of each score"
        raise UsageError(f"{labels.size} clusters of {len(first)} scores", cure=cure)
    groups = [(first - second)[labels == label] for label in np.unique(labels)]
    for group in groups:
        _check(group, group, block)
    ci95 = _bootstrap_clusters([group.reshape(-1, block).mean(-1) for group in groups], seed)
    return Paired(float((first - second).mean()) + 0.0, ci95, None, _verdict(ci95))


def _bootstrap_clusters(groups: list[NDArray[np.float64]], seed: int) -> Interval:
    """95 % percentile interval of the mean over drawn clusters, each weighing as its items."""
    rng, n = np.random.default_rng(seed), len(groups)
    sizes = np.array([len(group) for group in groups], float)
    totals, weights = np.zeros(N_DRAWS), np.zeros(N_DRAWS)
    for _ in range(n):
        drawn = rng.integers(0, n, N_DRAWS)
        means = np.stack([_resampled_means(rng, group) for group in groups])
        totals += means[drawn, np.arange(N_DRAWS)] * sizes[drawn]
        weights += sizes[drawn]
    low, high = np.quantile(totals / weights, [0.025, 0.975])
    return float(low) + 0.0, float(high) + 0.0


def bootstrap_mean(values: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean, from 10,000 resamples.

    A resample only matters through how often each distinct value comes: one multinomial draw.
    """
    low, high = np.quantile(_resampled_means(np.random.default_rng(seed), values), [0.025, 0.975])
    return float(low) + 0.0, float(high) + 0.0  # no -0.0


def _resampled_means(rng: np.random.Generator, values: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    parts = [rng.multinomial(n, counts / n, size=N_DRAWS // 10) for _ in range(10)]  # a tenth of the memory
    return np.concatenate([part @ distinct / n for part in parts])


def mcnemar(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Exact two-sided p of McNemar's test: are the items that differ split like coin tosses?"""
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(binomial_test()(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def binomial_test() -> Callable[[int, int], Any]:
    """SciPy's exact binomial test; `MissingExtra` without SciPy."""
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise MissingExtra("scipy", "report") from None
    return binomtest


def wilson(n_right: int, n: int) -> Interval:
    """95 % interval of a share; never outside [0, 1], never of width zero.

    >>> [round(edge, 4) for edge in wilson(10, 10)]
    [0.7225, 1.0]
    """
    if not 0 <= n_right <= n or n == 0:
        raise UsageError(
            f"{n_right} right of {n} items", cure="Count at least one item, and at most all of them right"
        )
    share, z2 = n_right / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _verdict(ci95: Interval) -> Verdict:
    if ci95[0] > 0:
        return "a better"
    return "b better" if ci95[1] < 0 else "undecided"


def _binary(scores: NDArray[np.float64]) -> bool:
    return bool(np.isin(scores, (0, 1)).all())


def _check(a: NDArray[np.float64], b: NDArray[np.float64], block: int) -> None:
    if a.shape != b.shape or a.ndim != 1 or not len(a) or block < 1 or len(a) % block:
        what = f"scores of shapes {a.shape} and {b.shape} in blocks of {block}"
        raise UsageError(what, cure="Give one score per item, of the same items, in whole blocks")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError(
            "a score is NaN or infinite", cure="Score a failed item as 0, or leave it out of both"
        )
