"""The narrow map: runs and places in them, its closed form, what matters to the receiver, its folded form."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import cache, geometry
from kvferry.align.contract import Contract
from kvferry.align.features import flatten, unflatten, with_neighbours
from kvferry.align.folder import load_aligner, save_aligner
from kvferry.align.narrow import NarrowMLP
from kvferry.align.ridge import Sums, solve
from kvferry.align.runs import in_runs
from kvferry.codec import CODECS, roundtrip
from kvferry.errors import UsageError

SENDER, RECEIVER = geometry(((1, 3, 3), (1, 3, 3))), geometry(((1, 2, 3),) * 2, model="ef")
BETWEEN = Contract(SENDER, RECEIVER)
N_IN, N_OUT = SENDER.floats_per_token, RECEIVER.floats_per_token


def repeated(lengths, seed=0):
    """A cache whose first entry stands in `lengths[0]` slots, and so on."""
    kv = cache(((1, 3, 3), (1, 3, 3)), n_tokens=sum(lengths), seed=seed)
    entries = flatten(kv)[:, : len(lengths)]
    index = torch.repeat_interleave(torch.tensor(lengths))
    return kv.with_groups(unflatten(entries[:, index], SENDER)), entries


def pairs(n=4000, neighbours=1, places=1, seed=0):
    """Correlated features and what a map of each place makes of them."""
    generator = torch.Generator().manual_seed(seed)
    width = neighbours * N_IN
    x = torch.randn(n, width, generator=generator) @ torch.randn(width, width, generator=generator) + 1
    place = torch.randint(places, (n,), generator=generator)
    maps = torch.randn(places, width, N_OUT, generator=generator)
    y = torch.einsum("ni,nio->no", x, maps[place]) + place[:, None]
    return x, place, y


def sums_of(x, place, y, places):
    return [Sums.of(x[place == index], y[place == index]) for index in range(places)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=25)
def test_a_slot_sees_the_runs_before_its_own(lengths, neighbours):
    kv, entries = repeated(lengths)
    wide, place = in_runs(kv, neighbours, places=4)
    assert place[0].tolist() == [min(depth, 3) for length in lengths for depth in range(length)]
    run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for back, part in enumerate(wide.chunk(neighbours, -1)):
        want = entries[0, (run - back).clamp(min=0)] * (run >= back).unsqueeze(-1)
        assert torch.equal(part[0], want)


def test_with_one_place_every_slot_is_a_run():
    kv, _ = repeated([2, 3, 1])
    wide, place = in_runs(kv, 3, places=1)
    assert torch.equal(wide, with_neighbours(kv, 3)) and not place.any()


@pytest.mark.parametrize("codec", ["raw", "int(bits=8)", "int(bits=4)"])
def test_a_codec_breaks_no_run_and_makes_none(codec):
    kv, _ = repeated([1, 4, 2, 1, 3])
    assert torch.equal(in_runs(roundtrip(CODECS.parse(codec), kv), 2, 4)[1], in_runs(kv, 2, 4)[1])


@pytest.mark.parametrize(("neighbours", "places"), [(1, 1), (2, 1), (1, 3)])
def test_at_full_rank_it_is_the_ridge_map_of_each_place(neighbours, places):
    x, place, y = pairs(neighbours=neighbours, places=places)
    narrow = NarrowMLP(BETWEEN, neighbours * N_IN, neighbours, places)
    sums = sums_of(x, place, y, places)
    narrow.start_from(sums, 1e-6)
    error = (narrow.map(x, place) - y).square().mean() / y.var()
    assert float(error.detach()) < 1e-3  # places borrow a little from each other
    if places == 1:
        weight, bias = solve(sums[0], 1e-6)
        assert torch.allclose(narrow.map(x, place), x @ weight + bias, atol=1e-3 * float(y.std()))


@torch.no_grad()
def test_what_matters_to_the_receiver_is_kept():
    """With as much rank as the loss has directions, nothing is lost of them."""
    x, place, y = pairs()
    directions = torch.randn(N_OUT, 2, generator=torch.Generator().manual_seed(1)).double()
    full, blind = NarrowMLP(BETWEEN, N_IN, 1), NarrowMLP(BETWEEN, 2, 1)
    full.start_from([Sums.of(x, y)], 1e-6)
    blind.start_from([Sums.of(x, y)], 1e-6)
    told = full.cut(2, 4, torch.ones(1), directions @ directions.T)
    assert torch.allclose(full.cut(2, 2, torch.ones(1)).map(x, place), blind.map(x, place), atol=1e-2)
    read = [((one.map(x, place) - y).double() @ directions).square().mean() for one in (told, blind)]
    assert float(read[0]) < 1e-4 * float((y.double() @ directions).var())
    assert float(read[1]) > 100 * float(read[0])


@torch.no_grad()
def test_folded_it_is_the_same_map_in_half_the_bytes(tmp_path):
    x, place, y = pairs(neighbours=2, places=3)
    narrow = NarrowMLP(BETWEEN, 8, 2, 3)
    narrow.start_from(sums_of(x, place, y, 3), 1e-4)
    torch.nn.init.normal_(narrow.bent, std=0.1)
    torch.nn.init.normal_(narrow.offset)
    plain = narrow.fold()
    assert plain.fold() is plain
    want = narrow.map(x, place)
    assert torch.allclose(plain.map(x, place), want, atol=1e-2 * float(want.std()))
    n_bytes = sum(tensor.nbytes for tensor in plain.state_dict().values())
    assert n_bytes == 2 * 8 * (2 * N_IN + 4 * N_OUT) + 4 * 3 * (8 + N_OUT)
    save_aligner(plain, tmp_path / "narrow", card="")
    again = load_aligner(tmp_path / "narrow")
    assert isinstance(again, NarrowMLP) and torch.equal(again.map(x, place), plain.map(x, place))


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError):
        NarrowMLP(BETWEEN, rank=N_IN + 1, neighbours=1)
    x, _, y = pairs()
    with pytest.raises(UsageError):
        NarrowMLP(BETWEEN, 2, 1, places=2).start_from([Sums.of(x, y)], 1e-3)
    narrow = NarrowMLP(replace(BETWEEN), 2, 1)
    narrow.start_from([Sums.of(x, y)], 1e-3)
    with pytest.raises(UsageError):
        narrow.fold().start_from([Sums.of(x, y)], 1e-3)
