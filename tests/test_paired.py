"""Paired statistics against numbers worked out by hand, and against repeated experiments."""

import sys

import numpy as np
import pytest

from kvferry.errors import MissingExtra, UsageError
from kvferry.metrics.paired import bootstrap_mean, paired, wilson


def test_mcnemar_by_hand():
    # 8 items only a has right, 1 only b: p = 2 * (C(9,0) + C(9,1)) / 2**9 = 20 / 512.
    a, b = [1] * 8 + [0] + [1] * 91, [0] * 8 + [1] + [1] * 91
    found = paired(a, b)
    assert found.p == pytest.approx(20 / 512)
    assert found.difference == pytest.approx(0.07)
    assert found.verdict == "a better"


def test_equal_scores_are_undecided():
    found = paired([1, 0, 1, 1], [1, 0, 1, 1])
    assert (found.difference, found.ci95, found.p, found.verdict) == (0.0, (0.0, 0.0), 1.0, "undecided")


def test_the_order_of_the_two_turns_the_verdict():
    a, b = np.r_[np.ones(90), np.zeros(10)], np.r_[np.ones(40), np.zeros(60)]
    one, other = paired(a, b), paired(b, a)
    assert (one.verdict, other.verdict) == ("a better", "b better")
    assert one.difference == -other.difference
    assert one.p == other.p


def test_a_single_differing_item_decides_nothing():
    assert paired([1] * 500, [1] * 499 + [0]).verdict == "undecided"


def test_real_scores_have_no_mcnemar():
    found = paired([0.5, 0.7, 0.9], [0.1, 0.2, 0.3])
    assert found.p is None
    assert found.ci95[0] <= found.difference <= found.ci95[1]
    assert found.verdict == "a better"


def test_bootstrap_is_the_normal_interval_for_many_items():
    values = np.random.default_rng(1).normal(0.3, 1.0, 1000)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 1000**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)


def test_seeded():
    a, b = np.random.default_rng(0).integers(0, 2, (2, 200))
    assert paired(a, b, seed=3) == paired(a, b, seed=3)


def test_blocks_widen_the_interval_of_items_that_agree():
    pairs = np.random.default_rng(0).integers(0, 2, 100).repeat(2)
    alone, together = paired(pairs, np.zeros(200)), paired(pairs, np.zeros(200), block=2)
    ratio = (together.ci95[1] - together.ci95[0]) / (alone.ci95[1] - alone.ci95[0])
    assert ratio == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.parametrize("n", [60, 200])
def test_coverage_of_the_difference(n: int):
    rng, hits, trials = np.random.default_rng(7), 0, 400
    for _ in range(trials):
        shared = rng.random(n)  # both answer easy items
        a, b = (shared < 0.6) | (rng.random(n) < 0.3), (shared < 0.6) | (rng.random(n) < 0.1)
        low, high = paired(a, b).ci95
        hits += low <= 0.4 * 0.2 <= high
    assert 0.91 <= hits / trials <= 0.98


def test_false_alarms_are_rare():
    rng, trials = np.random.default_rng(8), 400
    alarms = sum(paired(*rng.integers(0, 2, (2, 100))).verdict != "undecided" for _ in range(trials))
    assert alarms / trials <= 0.085


def test_wilson_by_hand():
    # n = 10, 5 right, z2 = 3.8415: middle 0.5, half = 1.96 / 1.38415 * sqrt(0.025 + 0.0096036).
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson(0, 50)[0] == 0.0
    assert 0.06 < wilson(0, 50)[1] < 0.08


def test_coverage_of_wilson():
    counts = np.random.default_rng(9).binomial(80, 0.9, 2000)
    hits = sum(low <= 0.9 <= high for low, high in (wilson(int(k), 80) for k in counts))
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.parametrize("bad", [([1], [1, 0]), ([], []), ([1, np.nan], [0, 1]), ([[1, 0]], [[1, 0]])])
def test_bad_scores_are_refused(bad):
    with pytest.raises(UsageError):
        paired(*bad)


@pytest.mark.parametrize("block", [0, 2])
def test_blocks_must_be_whole(block: int):
    with pytest.raises(UsageError, match=f"blocks of {block}"):
        paired([1, 0, 1], [0, 0, 1], block=block)


@pytest.mark.parametrize(("right", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(right: int, n: int):
    with pytest.raises(UsageError):
        wilson(right, n)


def test_scipy_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtra, match=r"kvferry\[report\]"):
        paired([1, 0], [0, 1])
