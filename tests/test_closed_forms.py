"""Closed forms find the map that made the data; controls do what their shapes say; layers are aggregated as one."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import cache, geometry
from kvferry.align.aggregate import AGGREGATIONS, DynamicKVExtractor, concat, mean, weighted
from kvferry.align.blocks import BlockMap, block_sums, blocks_of, cells, layer_features, restrict
from kvferry.align.blockwise import Blockwise, layer_errors, solve_blocks, unexplained
from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import flatten, unflatten, with_neighbours
from kvferry.align.folder import load_aligner, save_aligner
from kvferry.align.interpolate import Interpolate, interpolation
from kvferry.align.layer_map import LAYER_MAPS, Depths
from kvferry.align.low_rank import LowRank, solve_low_rank
from kvferry.align.procrustes import Procrustes, rotate
from kvferry.align.random_map import RandomMap
from kvferry.align.ridge import Sums, solve
from kvferry.align.truncate import Truncate
from kvferry.align.zero_pad import ZeroPad
from kvferry.errors import ShapeMismatch, UnknownName, UsageError, WrongKeySpace
from kvferry.kv import KV, Group

SENDER = ((2, 3, 4), (2, 3, 4), (1, 5, 2), (2, 3, 4))
RECEIVER = ((4, 2, 2), (1, 6, 3), (4, 2, 2))
WIDER = ((2, 3, 4), (3, 5, 4), (2, 4, 6), (2, 3, 4))
TINY = 1e-10


def contract_of(sender=SENDER, receiver=RECEIVER) -> Contract:
    return Contract(geometry(sender), geometry(receiver, model="ef"))


def sources_of(spec: str, contract: Contract) -> tuple[tuple[int, ...], ...]:
    return LAYER_MAPS.parse(spec)(Depths(contract.sender.n_layers, contract.receiver.n_layers))


def correlated(shapes=SENDER, n_tokens=300, seed=0) -> KV:
    """Channels that correlate, differ in scale and have means; a token's neighbours are not like it."""
    kv, groups = cache(shapes, n_tokens, n_batch=2, seed=seed), []
    for group in kv.groups:
        parts = []
        for number, states in enumerate((group.keys, group.values)):
            dim = states.shape[-1]
            mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim + number))
            parts.append(states @ mixing * torch.linspace(0.5, 3, dim) + torch.linspace(-2, 2, dim))
        groups.append(Group(group.layers, *parts))
    return kv.with_groups(tuple(groups))


def sums_of(kv: KV, target: KV, neighbours: int = 1) -> Sums:
    return Sums.of(with_neighbours(kv, neighbours).flatten(0, 1), flatten(target).flatten(0, 1))


def at_random(aligner: BlockMap) -> BlockMap:
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter)
    return aligner


def test_cells_are_where_flatten_puts_them():
    kv = cache(WIDER, n_tokens=4)
    flat, found = flatten(kv), cells(kv.geometry)
    assert sorted(place for places in found.values() for place in places) == list(range(flat.shape[-1]))
    for (layer, kind, head), places in found.items():
        assert torch.equal(flat[..., list(places)], kv.layer(layer)[kind][:, head])
    middle = [part.transpose(1, 2).flatten(2) for part in kv.layer(1)]
    assert torch.equal(flat[..., layer_features(kv.geometry, 1)], torch.cat(middle, -1))


@pytest.mark.parametrize("spec", ["terminal", "nearest_depth(k=2)", "uniform", "all"])
@pytest.mark.parametrize(
    ("heads", "reads"), [("all", "both"), ("all", "same"), ("ratio", "both"), ("ratio", "same")]
)
@pytest.mark.parametrize("neighbours", [1, 2])
def test_blockwise_finds_the_map_of_its_class(spec, heads, reads, neighbours):
    contract = contract_of()
    options = (sources_of(spec, contract), heads, reads, neighbours)
    truth, found = at_random(Blockwise(contract, *options)), Blockwise(contract, *options)
    kv = correlated()
    found.solve_from(sums_of(kv, truth(kv), neighbours), TINY)
    other = correlated(n_tokens=20, seed=1)
    assert torch.allclose(flatten(found(other)), flatten(truth(other)), atol=2e-3)


@pytest.mark.parametrize("heads", ["all", "ratio"])
def test_a_block_reads_what_its_map_says_and_nothing_else(heads):
    """Changing one cell of the sender changes exactly the cells that read it."""
    contract = contract_of()
    sources = ((0,), (2, 3), ())
    aligner, kv = at_random(Blockwise(contract, sources, heads, "same")), correlated(n_tokens=3)
    before = aligner(kv)
    for (layer, kind, head), places in cells(contract.sender).items():
        features = flatten(kv)
        features[..., list(places)] += 1
        after = flatten(aligner(kv.with_groups(unflatten(features, kv.geometry))))
        changed = (after != flatten(before)).any(0).any(0)
        expected = torch.zeros_like(changed)
        for (target, target_kind, target_head), held in cells(contract.receiver).items():
            n_sent, n_held = contract.sender.layers[layer].heads, contract.receiver.layers[target].heads
            one_to_one = heads == "all" or head == target_head * n_sent // n_held
            expected[list(held)] = layer in sources[target] and kind == target_kind and one_to_one
        assert torch.equal(changed, expected)


def test_blockwise_over_all_layers_is_the_dense_ridge():
    contract, kv, target = contract_of(), correlated(), correlated(RECEIVER, seed=3)
    sums = sums_of(kv, target, 2)
    aligner = Blockwise(contract, sources_of("all", contract), neighbours=2)
    assert len(aligner.blocks) == 1
    aligner.solve_from(sums, 1e-2)
    weight, bias = solve(sums, 1e-2)
    want = with_neighbours(kv, 2) @ weight + bias
    assert torch.allclose(flatten(aligner(kv)), want, atol=1e-4)


def test_maps_for_each_head_that_read_whole_layers_are_the_map_of_the_layer():
    """Outputs of a ridge map do not depend on each other."""
    contract = contract_of()
    sums = sums_of(correlated(), correlated(RECEIVER, seed=3))
    [whole] = blocks_of(contract, ((1,), (1,), (1,)))
    weight, bias = solve_blocks(sums, [whole], 0.1)[0]
    for start in range(0, len(whole.outputs), 5):
        part = replace(whole, outputs=whole.outputs[start : start + 5])
        one, shift = solve_blocks(sums, [part], 0.1)[0]
        assert torch.allclose(one, weight[:, start : start + 5], atol=1e-6)
        assert torch.allclose(shift, bias[start : start + 5], atol=1e-5)


def test_a_folder_keeps_the_map_of_every_block(tmp_path):
    """Of those without inputs too."""
    contract, kv = contract_of(), correlated(n_tokens=5)
    aligner = at_random(Blockwise(contract, ((0,), (2, 3), ()), "ratio", "same", neighbours=2))
    save_aligner(aligner, tmp_path / "a", card="")
    again = load_aligner(tmp_path / "a")
    assert again.options() == aligner.options()
    assert torch.equal(flatten(again(kv)), flatten(aligner(kv)))


def test_a_map_keeps_its_blocks_alone():
    contract = contract_of()
    aligner = Blockwise(contract, ((0,), (2,), ()), "ratio", "same")
    kept = sum(parameter.numel() for parameter in aligner.parameters())
    n_bias = contract.receiver.floats_per_token
    assert kept == n_bias + 4 * (3 * 2 + 4 * 2) + (5 * 6 + 2 * 3)


def test_sums_of_blocks_are_those_of_the_whole_and_add_in_any_order():
    contract, kv, target = contract_of(), correlated(), correlated(RECEIVER, seed=3)
    x, y = flatten(kv).flatten(0, 1).double(), flatten(target).flatten(0, 1).double()
    blocks = blocks_of(contract, sources_of("uniform", contract), "ratio")
    order = torch.randperm(len(x))
    cuts = [0, 7, 250, 251, len(x)]
    pieces = [order[start:end] for start, end in pairwise(cuts)]
    streams = [block_sums(x[piece], y[piece], blocks) for piece in pieces]
    for which, block in enumerate(blocks):
        whole = restrict(Sums.of(x, y), block)
        for turn in ([0, 1, 2, 3], [3, 1, 0, 2]):
            parts = [streams[i][which] for i in turn]
            merged = ((parts[0] + parts[1]) + parts[2]) + parts[3]
            assert merged.n == whole.n and merged.xx.shape == whole.xx.shape
            for name in ("x", "y", "xx", "xy", "yy"):
                assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-11, atol=1e-9)
            for one, other in zip(rotate(merged), rotate(whole), strict=True):
                assert torch.allclose(one, other, atol=1e-9)
            rank = min(merged.xy.shape)
            low, high = solve_low_rank(merged, rank, 0.1), solve_low_rank(whole, rank, 0.1)
            assert torch.allclose(low[0] @ low[1], high[0] @ high[1], atol=1e-9)
            assert torch.allclose(
                solve(merged, 0.1)[0], solve(whole, 0.1)[0], rtol=3e-7, atol=1e-9
            )  # rounded


@pytest.mark.parametrize("spec", ["terminal", "nearest_depth"])
def test_procrustes_finds_the_map_of_its_class(spec):
    """From narrow to wide; layers without a source are their mean."""
    contract = contract_of(((1, 3, 4), (1, 3, 4)), WIDER)
    truth = Procrustes(contract, sources_of(spec, contract))
    maps = []
    for block in truth.blocks:
        n_in, n_out = len(block.inputs), len(block.outputs)
        rotation = torch.linalg.qr(torch.randn(n_out, max(n_in, 1)))[0].T[:n_in]
        maps.append((rotation * (0.5 + torch.rand(())), torch.randn(n_out)))
    truth.set_blocks(maps)
    kv, other = correlated(((1, 3, 4), (1, 3, 4))), correlated(((1, 3, 4), (1, 3, 4)), 20, seed=1)
    found = Procrustes(contract, sources_of(spec, contract))
    found.solve_from(sums_of(kv, truth(kv)))
    assert torch.allclose(flatten(found(other)), flatten(truth(other)), atol=1e-4)


def test_from_wide_to_narrow_procrustes_finds_the_map_of_white_features():
    x, rotation = torch.randn(500, 6).double(), torch.linalg.qr(torch.randn(6, 3).double())[0]
    x = torch.linalg.qr(x - x.mean(0))[0] * 500**0.5
    weight, bias = rotate(Sums.of(x, 0.7 * x @ rotation + torch.tensor([1.0, 2, 3])))
    assert torch.allclose(weight, 0.7 * rotation, atol=1e-9)
    assert torch.allclose(bias, torch.tensor([1.0, 2, 3]).double(), atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4)])
def test_procrustes_is_orthogonal_and_the_best_of_its_kind(shape):
    n_in, n_out = shape
    x = torch.randn(400, n_in).double() @ torch.randn(n_in, n_in).double()
    y = x @ torch.randn(n_in, n_out).double() + torch.randn(400, n_out).double() + 5
    sums = Sums.of(x, y)
    weight, bias = rotate(sums)
    short = weight @ weight.T if n_in <= n_out else weight.T @ weight
    scale = short.diagonal().mean()
    assert torch.allclose(short, scale * torch.eye(len(short)).double(), atol=1e-9)
    assert torch.allclose((x @ weight + bias).mean(0), y.mean(0))
    error = (y - x @ weight - bias).square().sum()
    covariance = ((x - x.mean(0)) @ weight / scale.sqrt() * (y - y.mean(0))).sum()
    for _ in range(50):
        turned = weight @ torch.linalg.matrix_exp(0.05 * _skew(n_out))
        if n_in <= n_out:
            assert error <= (y - y.mean(0) - (x - x.mean(0)) @ turned).square().sum() + 1e-6
        assert covariance >= ((x - x.mean(0)) @ turned / scale.sqrt() * (y - y.mean(0))).sum() - 1e-6
        stretched = weight * (1 + 0.1 * torch.randn(()))
        assert error <= (y - y.mean(0) - (x - x.mean(0)) @ stretched).square().sum() + 1e-6


def _skew(n: int) -> Tensor:
    square = torch.randn(n, n).double()
    return square - square.T


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_finds_the_map_of_its_class(rank):
    contract, kv = contract_of(), correlated(n_tokens=600)
    truth, found = LowRank(contract, rank, neighbours=2), LowRank(contract, rank, neighbours=2)
    for parameter in truth.parameters():
        torch.nn.init.normal_(parameter)
    found.solve_from(sums_of(kv, truth(kv), 2), TINY)
    other = correlated(n_tokens=20, seed=1)
    assert torch.allclose(flatten(found(other)), flatten(truth(other)), rtol=1e-3, atol=1e-2)


def test_low_rank_at_full_rank_is_the_ridge():
    sums = sums_of(correlated(), correlated(RECEIVER, seed=3))
    for penalty in (1e-3, 0.3):
        down, up, bias = solve_low_rank(sums, min(sums.xy.shape), penalty)
        weight, shift = solve(sums, penalty)
        assert torch.allclose((down @ up).float(), weight, atol=1e-5)
        assert torch.allclose(bias.float(), shift, atol=1e-4)


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_low_rank_is_the_best_of_its_rank(penalty):
    """Better than any map nearby, and than the ridge map cut to the rank without whitening."""
    x = torch.randn(500, 8).double() @ torch.randn(8, 8).double()
    y = x @ torch.randn(8, 5).double() + torch.randn(500, 5).double()
    x, y = (x - x.mean(0)) / x.std(0, correction=0), (y - y.mean(0)) / y.std(0, correction=0)
    sums = Sums.of(x, y)

    def cost(weight: Tensor) -> Tensor:
        return (y - x @ weight).square().sum() / 500 + penalty * weight.square().sum()

    down, up, _ = solve_low_rank(sums, 2, penalty)
    assert torch.linalg.matrix_rank(down @ up) == 2
    left, values, right = torch.linalg.svd(solve(sums, penalty)[0].double(), full_matrices=False)
    assert cost(down @ up) < cost(left[:, :2] * values[:2] @ right[:2])
    for _ in range(50):
        near = (down + 0.03 * torch.randn_like(down)) @ (up + 0.03 * torch.randn_like(up))
        assert cost(down @ up) <= cost(near)


def test_layer_errors_are_what_held_out_data_says_and_choose_the_layers_that_made_them():
    contract = contract_of(((1, 3, 2),) * 5, ((1, 2, 3),) * 3)
    made_of = ((0, 3), (1, 2), (2, 4))
    truth = at_random(Blockwise(contract, made_of))
    train, held_out = correlated(((1, 3, 2),) * 5, seed=5), correlated(((1, 3, 2),) * 5, 90, seed=6)
    sums, test = sums_of(train, truth(train)), sums_of(held_out, truth(held_out))
    errors = layer_errors(sums, test, contract.sender, contract.receiver, 1e-6)
    assert errors.shape == (3, 5) and (errors > -1e-6).all()
    assert LAYER_MAPS.parse("top_k_sources(k=2)")(Depths(5, 3, errors=errors)) == made_of
    inputs, outputs = layer_features(contract.sender, 3), layer_features(contract.receiver, 1)
    (x, y), (new_x, new_y) = (
        (flatten(kv)[..., inputs].flatten(0, 1), flatten(truth(kv))[..., outputs].flatten(0, 1))
        for kv in (train, held_out)
    )
    weight, bias = solve(Sums.of(x, y), 1e-6)
    missed = (new_y - new_x @ weight - bias).square().mean(0)
    assert torch.allclose(errors[1, 3].float(), (missed / new_y.var(0, correction=0)).mean(), rtol=1e-4)


def test_held_out_data_tells_sources_apart_that_training_data_cannot():
    """With as many features as pairs every layer fits the training pairs; only one predicts others."""
    contract = contract_of(((1, 20, 20),) * 2, ((1, 2, 2),))
    truth = at_random(Blockwise(contract, ((1,),)))
    train, held_out = (cache(((1, 20, 20),) * 2, n, seed=n) for n in (41, 60))
    sums, test = sums_of(train, truth(train)), sums_of(held_out, truth(held_out))
    fitted = layer_errors(sums, sums, contract.sender, contract.receiver, 1e-9)
    unseen = layer_errors(sums, test, contract.sender, contract.receiver, 1e-9)
    assert (fitted < 1e-3).all() and unseen[0, 1] < 1e-3 and unseen[0, 0] > 1


def test_a_map_that_is_off_by_a_constant_is_told():
    x, y = torch.randn(50, 3), torch.randn(50, 2) * torch.tensor([1.0, 5.0])
    sums = Sums.of(x, y)
    weight, bias = solve(sums, 1e-6)
    left = unexplained(sums, (weight, bias + 2))
    direct = (y - x @ weight - bias - 2).square().mean(0) / y.var(0, correction=0)
    assert torch.allclose(left.float(), direct, rtol=1e-4)
    assert torch.allclose(unexplained(sums, (0 * weight, y.mean(0))).float(), torch.ones(2), atol=1e-5)


def test_coded_caches_in_the_sums_make_a_map_that_codes_do_not_break():
    """A clean map of nearly equal channels multiplies their noise; summed with noise in, it does not."""
    x = torch.randn(2000, 1) + 1e-4 * torch.randn(2000, 4)
    y = (x[:, :1] - x[:, 1:2]) * 1e4 + x[:, 2:3]
    noise = torch.randn(2, 2000, 4) * 0.05
    clean, coded = solve(Sums.of(x, y), 1e-12), solve(Sums.of(x + noise[0], y), 1e-12)
    error = [float((y - (x + noise[1]) @ weight - bias).square().mean()) for weight, bias in (clean, coded)]
    assert error[0] > 100 * error[1]


@pytest.mark.parametrize("control", [ZeroPad, Truncate, Interpolate])
@given(shapes=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4).map(tuple))
@settings(max_examples=25)
def test_controls_of_shape_leave_an_equal_shape_alone(control, shapes):
    contract, kv = contract_of(shapes, shapes), cache(shapes)
    assert torch.equal(flatten(control(contract)(kv)), flatten(kv))


@pytest.mark.parametrize("control", [ZeroPad, Truncate, Interpolate, RandomMap])
@given(
    sender=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4).map(tuple),
    receiver=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4).map(tuple),
)
@settings(max_examples=25)
def test_controls_fit_any_shape_and_cover_any_codec(control, sender, receiver):
    aligner, kv = control(contract_of(sender, receiver)), cache(sender)
    mapped = aligner(kv)
    assert mapped.geometry == aligner.contract.receiver
    assert flatten(mapped).isfinite().all()
    aligner.require_codec("int(bits=2)")


def test_truncate_by_hand():
    kv = cache(((2, 2, 3), (2, 2, 3)), n_tokens=1)
    mapped = Truncate(contract_of(((2, 2, 3), (2, 2, 3)), ((1, 3, 4), (3, 2, 1), (1, 1, 1))))(kv)
    keys, values = kv.layer(0)
    assert torch.equal(mapped.layer(0)[0].flatten(), keys.flatten()[:3])
    assert torch.equal(mapped.layer(0)[1].flatten(), values.flatten()[:4])
    assert torch.equal(mapped.layer(1)[0].flatten(), torch.cat([keys.flatten(), torch.zeros(2)]))
    assert torch.equal(mapped.layer(2)[1].flatten(), kv.layer(1)[1].flatten()[:1])


def test_interpolation_keeps_straight_lines_straight():
    for n_in, n_out in ((2, 5), (4, 3), (3, 3), (5, 1), (1, 3)):
        shares = interpolation(n_in, n_out)
        line = shares @ torch.arange(n_in).float()
        assert torch.allclose(shares.sum(1), torch.ones(n_out))
        assert torch.allclose(line.diff().diff(), torch.zeros(max(n_out - 2, 0)), atol=1e-6)
        assert n_out == 1 or (line[0], line[-1]) == (0, n_in - 1)
    kv = cache(((1, 2, 2),) * 2, n_tokens=1)
    middle = Interpolate(contract_of(((1, 2, 2),) * 2, ((1, 3, 2),) * 3))(kv).layer(1)[0].flatten()
    ends = (kv.layer(0)[0] + kv.layer(1)[0]).flatten() / 2
    assert torch.allclose(middle, torch.stack([ends[0], ends.mean(), ends[1]]), atol=1e-6)


def test_a_random_map_is_its_seed_and_keeps_lengths():
    shapes = ((4, 16, 16),) * 2
    contract, kv = contract_of(shapes, ((8, 16, 16),) * 3), cache(shapes, 50)
    one, same, other = (flatten(RandomMap(contract, seed)(kv)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert one.detach().square().mean().item() == pytest.approx(flatten(kv).square().mean().item(), rel=0.1)
    seeded = RandomMap(contract, 1)
    torch.manual_seed(5)
    assert torch.equal(flatten(seeded(kv)), one) and seeded.options() == {"seed": 1}


def uneven() -> KV:
    """A token that one layer lacks, and one that none holds; numbers there are NaN."""
    kv = cache(((2, 3, 4),) * 3, n_tokens=4, n_batch=2)
    kv.present[1, 0, 2] = False
    kv.present[:, 1, 0] = False
    for group in kv.groups:
        for states in (group.keys, group.values):
            states.masked_fill_(~kv.present[:, :, None, :, None], torch.nan)
    return kv


def test_layers_are_aggregated_by_hand():
    kv = uneven()
    keys, values = concat(kv)
    assert keys.shape == (2, 4, 18) and values.shape == (2, 4, 24)
    assert torch.equal(keys[0, 1, 6:12], kv.layer(1)[0][0, :, 1].flatten())
    assert torch.equal(concat(kv, [2, 0])[1][0, 1, :8], kv.layer(2)[1][0, :, 1].flatten())
    assert keys[0, 2, 6:12].abs().sum() == 0
    stacked = torch.stack([kv.layer(layer)[1].transpose(1, 2).flatten(2) for layer in range(3)])
    assert torch.allclose(mean(kv)[1][0, 1], stacked[:, 0, 1].mean(0))
    assert torch.allclose(mean(kv)[1][0, 2], stacked[[0, 2], 0, 2].mean(0))
    assert mean(kv)[0][1, 0].abs().sum() == 0
    shares = torch.tensor([0.2, 0.3, 0.5])
    assert torch.allclose(weighted(kv, shares)[1][0, 1], torch.tensordot(shares, stacked[:, 0, 1], dims=1))
    assert torch.allclose(
        weighted(kv, shares)[1][0, 2], (0.2 * stacked[0, 0, 2] + 0.5 * stacked[2, 0, 2]) / 0.7
    )
    assert torch.allclose(
        weighted(kv, shares[:2], [2, 0])[1][0, 1], 0.4 * stacked[2, 0, 1] + 0.6 * stacked[0, 0, 1]
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_extractor_gives_keys_and_values_of_the_layers_that_were_chosen(aggregation):
    kv = cache(((2, 3, 4),) * 3, n_tokens=4, n_batch=2)
    extractor = DynamicKVExtractor(3, aggregation, layers=[0, 2])
    keys, values = extractor.extract_kv(kv)
    n_rows = 2 if aggregation == "concat" else 1
    assert keys.shape == (2, 4, 6 * n_rows) and values.shape == (2, 4, 8 * n_rows)
    want = {"concat": concat, "mean": mean, "weighted": mean}[aggregation](kv, [0, 2])
    assert torch.allclose(keys, want[0]) and torch.allclose(values, want[1])
    if aggregation == "weighted":
        (keys.square().sum() + values.square().sum()).backward()
        assert extractor.logits.grad.abs().min() > 0
    else:
        assert list(extractor.parameters()) == []


def test_what_cannot_be_aggregated_is_refused():
    kv = cache(((2, 3, 4),) * 3)
    rotated = replace(kv, space="rotated")
    with pytest.raises(WrongKeySpace):
        mean(rotated)
    with pytest.raises(ShapeMismatch, match="no mean"):
        mean(cache(((2, 3, 4), (2, 4, 4))))
    with pytest.raises(ShapeMismatch, match="2 weights for 3"):
        weighted(kv, torch.ones(2))
    with pytest.raises(UsageError, match="layers"):
        concat(kv, [3])
    with pytest.raises(UsageError, match="layers"):
        mean(kv, [])
    with pytest.raises(UnknownName, match="'concat'"):
        DynamicKVExtractor(3, "concatenate")
    assert concat(rotated)[0].shape == (1, 7, 18)
    assert mean(cache(((2, 3, 4), (2, 4, 4), (2, 3, 4))), [0, 2])[0].shape == (1, 7, 6)


def test_maps_that_cannot_be_are_refused():
    contract = contract_of()
    with pytest.raises(UsageError, match="sources"):
        Blockwise(contract, ((0,), (1,)))
    with pytest.raises(UsageError, match="layers below 4"):
        Blockwise(contract, ((0,), (1,), (4,)))
    with pytest.raises(UsageError, match="0 neighbours"):
        Blockwise(contract, neighbours=0)
    with pytest.raises(UnknownName, match="'ratio'"):
        Blockwise(contract, heads="rato")
    with pytest.raises(UsageError, match="without errors"):
        Blockwise(contract, heads="top_k_sources")
    with pytest.raises(UsageError, match="rank 99"):
        LowRank(contract, 99)
    sums = sums_of(correlated(), correlated(RECEIVER))
    with pytest.raises(UsageError, match="penalty"):
        solve_low_rank(sums, 2, 0.0)


@pytest.mark.parametrize("name", ["Blockwise", "Procrustes", "LowRank"])
def test_constant_channels_and_empty_sources_break_nothing(name):
    contract, kv, target = contract_of(), correlated(), correlated(RECEIVER, seed=3)
    for some in (kv, target):
        for group in some.groups:
            group.keys[..., 0] = 3.5
            group.values[0] = 0
    sums = sums_of(kv, target)
    aligner: Aligner
    if name == "LowRank":
        aligner = LowRank(contract, 5)
        aligner.solve_from(sums, 1e-2)
    elif name == "Blockwise":
        aligner = Blockwise(contract, ((), (0, 2), (3,)), "ratio")
        aligner.solve_from(sums, 1e-2)
    else:
        aligner = Procrustes(contract, ((), (0, 2), (3,)))
        aligner.solve_from(sums)
    mapped = flatten(aligner(kv))
    assert mapped.isfinite().all()
    assert np.allclose(mapped.mean((0, 1)).detach(), flatten(target).mean((0, 1)), atol=1e-3)
