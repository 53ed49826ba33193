"""Allocation: equal to trying every choice where that can be done, never worse than what anybody would do by hand."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.select.knapsack import by_slope, convex_hull, totals, within


def instance(n_units, n_options, seed, whole=False):
    """Options of growing cost and mostly falling loss, as a codec offers them; the first costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 9, (n_units, n_options), generator=generator).double().cumsum(1)
    bits -= bits[:, :1].clone()
    scale = torch.rand((n_units, 1), generator=generator).double() * 20
    noise = torch.rand((n_units, n_options), generator=generator).double()
    loss = scale * 2.0 ** (-bits / 4) * (0.5 + noise)
    return (loss.round() if whole else loss), bits


def tables():
    return st.builds(instance, st.integers(1, 5), st.integers(1, 4), st.integers(0, 1 << 30), st.booleans())


def by_trying(distortion, bits, max_bits):
    """The least distortion of all choices that fit; None if none does."""
    choices = torch.tensor(list(product(range(bits.shape[1]), repeat=len(bits))))
    units = torch.arange(len(bits))
    fits = bits[units, choices].sum(1) <= max_bits
    return float(distortion[units, choices].sum(1)[fits].min()) if bool(fits.any()) else None


def shares(distortion, bits):
    least, most = float(bits.amin(1).sum()), float(bits.amax(1).sum())
    return [least, most, *(float(round(least + share * (most - least))) for share in (0.2, 0.5, 0.8))]


@given(tables())
def test_it_is_what_trying_every_choice_finds(tables):
    distortion, bits = tables
    for max_bits in shares(distortion, bits):
        lost, taken = totals(distortion, bits, within(distortion, bits, max_bits))
        assert taken <= max_bits
        assert lost == pytest.approx(by_trying(distortion, bits, max_bits), abs=1e-9)


@given(tables(), st.floats(0, 100))
def test_a_slope_gives_the_best_choice_of_its_own_size(tables, slope):
    distortion, bits = tables
    lost, taken = totals(distortion, bits, by_slope(distortion, bits, slope))
    assert lost == pytest.approx(by_trying(distortion, bits, taken), abs=1e-9)


@given(tables())
def test_the_hull_is_what_slopes_choose(tables):
    distortion, bits = tables
    hull = convex_hull(distortion, bits)
    chosen = torch.zeros_like(hull)
    slopes = (
        (distortion.unsqueeze(1) - distortion.unsqueeze(2)) / (bits.unsqueeze(2) - bits.unsqueeze(1))
    ).flatten()
    edges = torch.cat([slopes[slopes.isfinite() & (slopes >= 0)], torch.tensor([0.0, 1e3]).double()]).unique()
    for slope in ((edges[1:] + edges[:-1]) / 2).tolist():
        chosen[torch.arange(len(bits)), by_slope(distortion, bits, slope)] = True
    assert torch.equal(chosen, hull)


@pytest.mark.parametrize(("n_units", "max_work"), [(40, 1 << 21), (40, 0), (300, 1 << 21), (300, 0)])
def test_it_is_never_worse_than_one_option_for_all_or_from_the_top(n_units, max_work):
    for seed in range(4):
        distortion, bits = instance(n_units, 5, seed)
        bits[:] = bits[:1]
        for option in range(5):
            same = torch.full((n_units,), option)
            lost, taken = totals(distortion, bits, same)
            found = totals(distortion, bits, within(distortion, bits, taken, max_work))
            greedy = totals(distortion, bits, from_the_top(distortion, bits, taken))
            assert found[1] <= taken
            assert found[0] <= min(lost, greedy[0])


def from_the_top(distortion, bits, max_bits):
    """What needs it most gets the finest that fits, then the next."""
    choice, left = torch.zeros(len(bits), dtype=torch.int64), max_bits
    for unit in distortion[:, 0].argsort(dim=0, descending=True, stable=True).tolist():
        best = min((float(distortion[unit, o]), o) for o in range(bits.shape[1]) if bits[unit, o] <= left)[1]
        choice[unit], left = best, left - float(bits[unit, best])
    return choice


def test_hundreds_of_units_are_still_solved_exactly():
    """Against the table of every number of bits (dynamic programming), which needs whole bits and no bound."""
    for seed in range(5):
        distortion, bits = instance(200, 5, seed)
        max_bits = int(bits.amax(1).sum()) // 3
        best = torch.zeros(max_bits + 1).double()
        for loss, cost in zip(distortion, bits.long().tolist(), strict=True):
            options = torch.full((len(cost), max_bits + 1), torch.inf).double()
            for option, taken in enumerate(cost):
                options[option, taken:] = best[: max_bits + 1 - taken] + loss[option]
            best = options.amin(0)
        lost, _ = totals(distortion, bits, within(distortion, bits, max_bits))
        assert lost == pytest.approx(float(best[-1]), rel=1e-12)


def test_thousands_of_units_without_proof_are_as_good_as_makes_no_odds():
    distortion, bits = instance(3000, 6, 1)
    bits += torch.rand(bits.shape, generator=torch.Generator().manual_seed(2)).double()
    max_bits = float(bits.mean(1).sum())
    lost, taken = totals(distortion, bits, within(distortion, bits, max_bits, max_work=0))
    slopes = torch.linspace(0.01, 5, 200).tolist()
    dual = max(
        sum(a + s * b for a, b in [totals(distortion, bits, by_slope(distortion, bits, s))]) - s * max_bits
        for s in slopes
    )
    assert taken <= max_bits
    assert dual <= lost < dual * 1.01


def test_more_bits_never_lose_more():
    distortion, bits = instance(12, 4, 7)
    lost = [
        totals(distortion, bits, within(distortion, bits, n))[0] for n in range(int(bits.amax(1).sum()) + 1)
    ]
    assert lost == sorted(lost, reverse=True)


def test_an_option_of_infinite_loss_is_not_on_offer():
    distortion = torch.tensor([[torch.inf, 3.0], [1.0, torch.inf]])
    bits = torch.tensor([[0.0, 4.0], [2.0, 0.0]])
    assert within(distortion, bits, 6).tolist() == by_slope(distortion, bits, 5.0).tolist() == [1, 0]
    assert convex_hull(distortion, bits).tolist() == [[False, True], [True, False]]
    with pytest.raises(UsageError, match="takes 6"):
        within(distortion, bits, 5.9)


def test_what_is_no_instance_is_refused():
    with pytest.raises(ShapeMismatch, match="finite bits"):
        within(torch.zeros(1, 2), torch.full((1, 2), torch.inf), 1)
    with pytest.raises(UsageError, match="NaN"):
        within(torch.full((1, 2), torch.nan), torch.zeros(1, 2), 1)
