"""Trained maps: each starts where its closed form ends, and says what it is to the last parameter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract import cache, geometry
from kvferry.align.bidirectional import BiDirectionalProjector, pooled, top
from kvferry.align.contract import Contract
from kvferry.align.elastic import ElasticBottleneck
from kvferry.align.features import flatten, with_neighbours
from kvferry.align.heads import flatten_kv_heads, unflatten_kv_heads
from kvferry.align.headwise import HeadwiseProjector
from kvferry.align.kv_projector import KVCacheProjector
from kvferry.align.kv_projector_mlp import KVCacheProjectorMLP
from kvferry.align.linear import affine
from kvferry.align.map_projection import MapProjectionAligner
from kvferry.align.resample import resample
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.ridge import Sums, solve
from kvferry.align.shares import share_matrix
from kvferry.align.time_warping import TimeWarping, segments, warp_weights
from kvferry.errors import ShapeMismatch, UsageError, WrongKeySpace

SENDER, RECEIVER = ((2, 3, 4), (2, 3, 4), (1, 2, 2)), ((1, 5, 3), (2, 4, 4))


def pair(n_tokens=400):
    """A sender's cache, uneven in scale and correlated, and a receiver's cache that hangs on it."""
    sent, held = cache(SENDER, n_tokens, n_batch=2, scale=3.0), cache(RECEIVER, n_tokens, n_batch=2)
    for row in range(1, 3):
        keys = sent.layer(row)[0]
        keys.mul_(10.0**row).add_(row)
    even = (flatten(sent) - flatten(sent).mean((0, 1))) / flatten(sent).std((0, 1))
    n_in, n_out = even.shape[-1], flatten(held).shape[-1]
    bent = torch.relu(even @ torch.randn(n_in, 2)) @ torch.randn(2, n_out)
    target = 7 + 10 * (even @ torch.randn(n_in, n_out) + bent)
    return sent, target, Contract(sent.geometry, held.geometry)


def features_of(kv, neighbours=1):
    return with_neighbours(kv, neighbours).flatten(0, 1)


@pytest.fixture
def fitted():
    sent, target, contract = pair()
    aligner = ResidualMLP(contract, neighbours=2, hidden=8)
    sums = Sums.of(features_of(sent, 2), target.flatten(0, 1))
    weight, bias = solve(sums, 1e-3)
    aligner.start_from(sums, weight, bias)
    return sent, target, aligner, affine(sent, weight, bias, contract)


def test_the_residual_map_starts_at_the_ridge(fitted):
    sent, _, aligner, ridge = fitted
    assert torch.allclose(flatten(aligner(sent)), flatten(ridge), rtol=1e-4, atol=1e-3)


def test_whitened_coordinates_have_unit_variance(fitted):
    sent, _, aligner, _ = fitted
    z = (features_of(sent, 2) - aligner.x_mean) @ aligner.basis
    covariance = z.T @ z / len(z)
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=2e-2)


def test_a_few_steps_of_the_residual_beat_the_ridge(fitted):
    sent, target, aligner, ridge = fitted
    optimizer = torch.optim.Adam(aligner.parameters(), 1e-2)
    for _ in range(150):
        loss = ((flatten(aligner(sent)) - target) / aligner.y_std).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * ((flatten(ridge) - target) / aligner.y_std).square().mean()


def test_folding_keeps_the_map_and_drops_the_basis(fitted):
    sent, _, aligner, _ = fitted
    torch.nn.init.normal_(aligner.down.weight)
    plain = aligner.fold()
    assert torch.allclose(flatten(plain(sent)), flatten(aligner(sent)), rtol=1e-3, atol=1e-2)
    assert set(plain.state_dict()) == {"inner", "shift", "up.weight", "up.bias", "down.weight"}
    assert plain.options()["folded"] and plain.fold() is plain


# Heads


@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 6))
def test_heads_side_by_side_and_back_are_the_same(heads, tokens, dim):
    states = torch.randn(2, 3, heads, tokens, dim)
    wide = flatten_kv_heads(states)
    assert wide.shape == (2, 3, tokens, heads * dim)
    assert torch.equal(unflatten_kv_heads(wide, heads), states)


def test_query_heads_are_refused_for_keys():
    with pytest.raises(ShapeMismatch, match="256 channels for 12 heads"):
        unflatten_kv_heads(torch.zeros(1, 2, 256), 12)


# What all projectors share


def projectors(contract):
    every = [[*range(contract.sender.n_layers)]] * contract.receiver.n_layers
    return [
        KVCacheProjector(contract, every),
        KVCacheProjectorMLP(contract, every, hidden_dim=16),
        ElasticBottleneck(contract, every, dropout=0.0),
        HeadwiseProjector(contract, every),
        MapProjectionAligner(contract),
    ]


KINDS = [0, 1, 2, 3, 4]


@torch.no_grad()
def error(aligner, sent, target):
    """Mean squared error per channel, in units of its variance."""
    return float(((flatten(aligner(sent)) - target).square().mean((0, 1)) / target.var((0, 1))).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_has_the_receivers_scale(kind):
    sent, target, contract = pair()
    aligner = projectors(contract)[kind]
    aligner.fit_scale(Sums.of(features_of(sent), target.flatten(0, 1)))
    out = flatten(aligner(sent))
    assert torch.allclose(out.mean((0, 1)), target.mean((0, 1)), rtol=0.5, atol=5)
    moved = projectors(contract)[kind]
    moved.load_state_dict(aligner.state_dict())
    moved.fit_scale(Sums.of(features_of(sent), 100 * target.flatten(0, 1) - 3))
    assert torch.allclose(flatten(moved(sent)), 100 * out - 3, rtol=1e-3, atol=1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_differ_in_length_still_do_afterwards(kind):
    """Which a layer normalisation at the end would undo."""
    contract = pair()[2]
    aligner = projectors(contract)[kind]
    even = torch.randn(contract.sender.floats_per_token)
    short, long = aligner.map(even), aligner.map(50 * even)
    assert long.norm() > 10 * short.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_learns(kind):
    sent, target, contract = pair(100)
    aligner = projectors(contract)[kind]
    aligner.fit_scale(Sums.of(features_of(sent), target.flatten(0, 1)))
    before = error(aligner, sent, target)
    optimizer = torch.optim.Adam(aligner.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        ((flatten(aligner(sent)) - target) / aligner.y_std).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in aligner.parameters())
        optimizer.step()
    assert error(aligner, sent, target) < 0.8 * before


def test_a_norm_at_the_end_forgets_the_length_of_tokens():
    contract = pair()[2]
    aligner = KVCacheProjector(contract, output_norm=True)
    even = torch.randn(contract.sender.floats_per_token)
    assert torch.allclose(aligner.map(even), aligner.map(50 * even), atol=1e-2)


def test_parts_of_unlike_shape_and_neighbours_go_where_they_belong():
    """With copies as weights, and all layers of the sender in reverse, the cache comes back in reverse."""
    sent = cache(((2, 3, 4), (1, 5, 2), (2, 3, 4)), 5)
    order = [[2], [1], [0]]
    held = geometry(((2, 3, 4), (1, 5, 2), (2, 3, 4)))
    aligner = KVCacheProjector(Contract(sent.geometry, held), order, neighbours=2)
    mapped = aligner(sent)
    for layer in range(3):
        assert all(torch.equal(a, b) for a, b in zip(mapped.layer(layer), sent.layer(2 - layer), strict=True))


def test_targets_together_and_apart_make_the_same_cache_from_the_same_weights():
    sent = cache(n_tokens=5)
    contract = Contract(sent.geometry, sent.geometry)
    every = [[*range(sent.geometry.n_layers)]]
    whole = KVCacheProjector(contract, sources=every, targets=every)
    assert torch.equal(flatten(whole(sent)), flatten(sent))
    assert len(whole.parts) == 1 and whole.parts[0].n_parts == 2


def test_a_part_without_sources_is_its_mean():
    sent, target, contract = pair()
    sums = Sums.of(features_of(sent), target.flatten(0, 1))
    for make in (KVCacheProjector, HeadwiseProjector, ElasticBottleneck):
        aligner = make(contract, sources=[[], [1]])
        aligner.fit_scale(sums)
        keys = aligner(sent).layer(0)[0]
        assert torch.allclose(keys, keys[:, :, :1].expand_as(keys))
    solved = KVCacheProjector(contract, sources=[[], [1]])
    solved.start_from(sums, 1e-3)
    assert torch.allclose(flatten(solved(sent)).mean((0, 1)), target.mean((0, 1)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sources": [[0]]}, "sources for 1 and targets for 2 parts"),
        ({"sources": [[0], [3]]}, r"sources \[\[0\], \[3\]\]"),
        ({"sources": [[0], [-1]]}, r"sources"),
        ({"targets": [[0], [0]]}, "targets"),
        ({"sources": [[0], [1], [2]], "targets": [[0], [1], []]}, "targets"),
        ({"neighbours": 0}, "0 neighbours"),
    ],
)
def test_layer_maps_that_cannot_be_are_refused(options, match):
    with pytest.raises(UsageError, match=match):
        KVCacheProjector(pair(5)[2], **options)


@pytest.mark.parametrize("options", [{"mlp_ratio": 0.0}, {"dropout": 1.0}])
def test_bottlenecks_that_cannot_be_are_refused(options):
    with pytest.raises(UsageError, match="mlp_ratio"):
        ElasticBottleneck(pair(5)[2], **options)


# Closed forms


def test_the_projector_of_all_layers_at_once_starts_at_the_ridge_of_each_kind():
    """Keys from keys, values from values: two ridge maps, solved as one batch."""
    sent, target, contract = pair()
    every = {"sources": [[0, 1, 2]], "targets": [[0, 1]]}
    aligner = KVCacheProjector(contract, **every, neighbours=2)
    aligner.start_from(Sums.of(features_of(sent, 2), target.flatten(0, 1)), 1e-2)
    keys = torch.cat([sent.layer(i)[0].transpose(1, 2).flatten(2) for i in range(3)], -1)
    keys = torch.cat([keys, torch.nn.functional.pad(keys, (0, 0, 1, 0))[:, :-1]], -1)
    held = replace(sent, geometry=contract.receiver, groups=aligner(sent).groups, present=sent.present[:2])
    where = [
        0,
        1,
        2,
        3,
        4,
        *range(8, 16),
    ]  # keys of the first layer, which is its own group, then of the second
    weight, bias = solve(Sums.of(keys.flatten(0, 1), target[..., where].flatten(0, 1)), 1e-2)
    assert torch.allclose(flatten(held)[..., where], keys @ weight + bias, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_headwise_finds_a_map_of_its_own_kind(shared, neighbours):
    contract = Contract(geometry(((3, 4, 4), (3, 4, 4))), geometry(((2, 5, 5), (2, 5, 5)), model="ef"))
    planted, found = (
        HeadwiseProjector(contract, neighbours=neighbours, share_dim_proj=shared) for _ in range(2)
    )
    for parameter in planted.parameters():
        torch.nn.init.normal_(parameter)
    [there], [here] = planted.heads, found.heads
    torch.nn.init.zeros_(there.bias)
    x = torch.randn(300, 4, 12 * neighbours)
    with torch.no_grad():
        y = there(x)
        here.fit(*(torch.einsum("npi,npo->pio", x, z).double() / 300 for z in (x, y)), 1e-7)
        assert (here(x) - y).square().mean() < 1e-4 * y.square().mean()


def test_headwise_starts_better_than_as_a_copy():
    sent, target, contract = pair()
    aligner = HeadwiseProjector(contract)
    sums = Sums.of(features_of(sent), target.flatten(0, 1))
    aligner.fit_scale(sums)
    before = error(aligner, sent, target)
    aligner.start_from(sums, 1e-3)
    dense = KVCacheProjector(contract)
    dense.start_from(sums, 1e-3)
    assert 0.99 * error(dense, sent, target) < error(aligner, sent, target) < 0.9 * before


def test_headwise_has_few_parameters_and_starts_as_a_copy():
    sent = cache(n_tokens=4)
    contract = Contract(sent.geometry, sent.geometry)
    for shared in (True, False):
        aligner = HeadwiseProjector(contract, neighbours=3, share_dim_proj=shared)
        assert torch.equal(flatten(aligner(sent)), flatten(sent))
    n_dense = sum(p.numel() for p in KVCacheProjector(contract).parameters())
    n_heads = sum(p.numel() for p in HeadwiseProjector(contract, share_dim_proj=True).parameters())
    assert n_heads < n_dense / 2


# Sizes that others have published


def size(aligner, per=2):
    n_parameters = sum(parameter.numel() for parameter in aligner.parameters())
    assert n_parameters % per == 0
    return n_parameters // per


def test_published_sizes():
    """For keys and for values each. The first is often given as 2,101,248, which leaves the normalisation out."""
    small, large = geometry(((4, 128, 128),)), geometry(((32, 128, 128),))
    contract = Contract(small, large)
    with torch.device("meta"):
        assert size(KVCacheProjector(contract, [[0]], output_norm=True)) == 2_109_440
        assert size(KVCacheProjector(contract, [[0]])) == 2_101_248
        assert size(KVCacheProjectorMLP(contract, [[0]], output_norm=True)) == 4_731_904


def test_published_size_of_the_bottleneck():
    contract = Contract(geometry(((2, 128, 128),) * 28), geometry(((2, 64, 64),) * 24))
    with torch.device("meta"):
        whole = ElasticBottleneck(contract, [[*range(28)]], [[*range(24)]])
        assert size(whole) == 73_424_896
        assert size(ElasticBottleneck(contract, [[layer] for layer in range(24)]), per=48) == 99_200


# Axes


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_axes_start_at_the_mean_or_in_place(uniform, shared):
    sent = cache(n_tokens=4)
    aligner = MapProjectionAligner(
        Contract(sent.geometry, sent.geometry), share_dim_proj=shared, init_uniform=uniform
    )
    assert aligner.options() == {"share_dim_proj": shared, "init_uniform": uniform}
    keys = sent.groups[0].keys
    want = keys.mean((0, 2), keepdim=True).expand_as(keys) if uniform else keys
    assert torch.allclose(aligner(sent).groups[0].keys, want, atol=1e-6)
    assert next(iter(aligner.axes)).dims.shape[1] == (1 if shared else 3)


def test_queries_go_along_the_axes_of_keys_and_may_be_missing():
    sender, receiver = geometry(((2, 4, 4),) * 3), geometry(((1, 6, 6),) * 2)
    aligner = MapProjectionAligner(Contract(sender, receiver))
    assert aligner.project_queries(None) is None
    keys = torch.randn(3, 2, 2, 5, 4)
    alone = aligner.project_queries(
        keys
    )  # one query head per key head: mapped as keys are, since bias and means are 0
    kv = cache(((2, 4, 4),) * 3, 5, 2)
    group = replace(kv.groups[0], keys=keys)
    assert torch.allclose(alone, aligner(kv.with_groups((group,))).groups[0].keys, atol=1e-6)
    twice = aligner.project_queries(keys.repeat_interleave(2, 2))
    assert torch.allclose(twice, alone.repeat_interleave(2, 2), atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 9))
def test_shares_of_a_row_sum_to_one_and_cover_the_other_evenly(n_held, n_sent):
    matrix = share_matrix(n_held, n_sent)
    assert torch.allclose(matrix.sum(1), torch.ones(n_held))
    assert torch.allclose(matrix.sum(0), torch.full((n_sent,), n_held / n_sent))
    assert n_held != n_sent or torch.equal(matrix, torch.eye(n_held))


# Time

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(COUNTS, st.data())
def test_warping_keeps_to_segments_and_rows_sum_to_one(sent_counts, data):
    held_counts = data.draw(st.lists(st.integers(1, 5), min_size=len(sent_counts), max_size=len(sent_counts)))
    sent, held = segments([sent_counts, [3]]), segments([held_counts, [2]])
    weights = warp_weights(sent, held)
    assert (weights >= 0).all()
    assert (weights * (held.unsqueeze(2) != sent.unsqueeze(1))).abs().max() == 0
    filled = (held.unsqueeze(2) == sent.unsqueeze(1)).any(-1) & (held >= 0)
    assert torch.allclose(weights.sum(-1), filled.float(), atol=1e-6)


@given(COUNTS)
def test_warping_to_as_many_tokens_is_the_identity(counts):
    rows = segments([counts, counts[::-1]])
    weights = warp_weights(rows, rows)
    assert torch.equal(weights, torch.diag_embed((rows >= 0).float()))


def test_warping_interpolates_lines_and_takes_means():
    line = torch.arange(6.0)
    up = warp_weights(segments([[6]]), segments([[11]]))[0] @ line
    assert torch.allclose(up.diff()[2:-2], up.diff()[3].expand(6), atol=1e-6) and up[0] == 0 and up[-1] == 5
    assert torch.equal(
        warp_weights(segments([[6]]), segments([[3]]))[0] @ line, torch.tensor([0.5, 2.5, 4.5])
    )


def test_each_row_of_a_batch_has_its_own_segments():
    kv = cache(n_tokens=4, n_batch=2)
    sent, held = segments([[1, 3], [3, 1]]), segments([[1, 1], [1, 1]])
    warped = TimeWarping()(kv, sent, held)
    keys = kv.groups[0].keys
    assert torch.allclose(warped.groups[0].keys[:, 0, :, 1], keys[:, 0, :, 1:].mean(2), atol=1e-6)
    assert torch.allclose(warped.groups[0].keys[:, 1, :, 0], keys[:, 1, :, :3].mean(2), atol=1e-6)
    aligner = MapProjectionAligner(Contract(kv.geometry, kv.geometry))
    assert torch.allclose(aligner(kv, sent, held).groups[0].keys, warped.groups[0].keys, atol=1e-6)


def test_a_slot_without_tokens_is_absent_and_absent_tokens_weigh_nothing():
    kv = cache(n_tokens=3)
    present = kv.present.clone()
    present[1, 0, 1] = False
    found = resample(
        replace(kv, present=present), torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]])
    )
    assert found.present.tolist() == [[[True, False, True]]] * 3
    assert torch.equal(found.groups[0].keys[..., 0, :], kv.groups[0].keys[..., 0, :])
    assert torch.allclose(found.groups[0].values[..., 2, :], kv.groups[0].values[..., 2, :])
    assert found.positions.tolist() == [[[0, 0, 2]]]


def test_rotated_keys_are_not_averaged():
    kv = replace(cache(n_tokens=3), space="rotated")
    with pytest.raises(WrongKeySpace):
        resample(kv, torch.ones(1, 1, 3))


# Both ways


def test_there_and_back_is_the_identity_where_nothing_is_lost():
    sent = cache(((1, 3, 3), (1, 2, 2)), 200)
    large = geometry(((2, 4, 4), (2, 4, 4)), model="ef")
    contract = Contract(sent.geometry, large, stride=2.0)
    there = KVCacheProjector(contract)
    for linear in there.linear:
        torch.nn.init.normal_(linear.weight)
    held = there(sent)
    aligner = BiDirectionalProjector(contract)
    x, y = features_of(sent), features_of(held)
    aligner.start_from(Sums.of(x, y), Sums.of(y, x), 1e-9)
    assert torch.allclose(flatten(aligner.forward_expand(sent)), flatten(held), atol=1e-2)
    back = aligner.forward_compress(held, sent.n_tokens)
    assert back.geometry == sent.geometry and torch.allclose(flatten(back), flatten(sent), atol=1e-2)
    assert aligner.compress.contract.stride == 0.5
    assert aligner.forward_compress(held, 7).n_tokens == 7


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_pooled_slots_are_means_of_stretches_in_order(n_slots, n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, n_tokens, generator=generator)
    present = torch.rand(2, n_tokens, generator=generator) > 0.3
    weights = pooled(scores, present, n_slots)
    used = weights.sum(-1)
    n_used = present.sum(-1).clamp(max=n_slots)
    assert torch.allclose(used, (torch.arange(n_slots) >= n_slots - n_used.unsqueeze(-1)).float(), atol=1e-6)
    assert torch.equal((weights > 0).sum(1), present.long())
    assert (weights.argmax(-1).diff() * used[:, :-1] >= 0).all()


def test_the_score_decides_within_a_stretch_and_is_trained():
    scores = torch.tensor([[0.0, 100.0, 0.0, 0.0]], requires_grad=True)
    present = torch.ones(1, 4, dtype=torch.bool)
    weights = pooled(scores, present, 2)
    assert torch.allclose(weights, torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]))
    (weights[0, 1] @ torch.arange(4.0)).backward()
    assert scores.grad.abs().sum() > 0


def test_top_keeps_the_best_tokens_in_order():
    scores = torch.tensor([[3.0, 9.0, 1.0, 5.0], [3.0, 9.0, 1.0, 5.0]])
    present = torch.tensor([[True, True, True, True], [False, False, True, False]])
    weights = top(scores, present, 2)
    assert weights[0].argmax(-1).tolist() == [1, 3] and torch.equal(weights[0].sum(-1), torch.ones(2))
    assert weights[1].sum() == 1 and weights[1, :, 2].sum() == 1
    kv = cache(n_tokens=4)
    aligner = BiDirectionalProjector(Contract(kv.geometry, kv.geometry))
    torch.nn.init.ones_(aligner.score)
    best = flatten(kv).sum(-1).topk(2).indices.sort(-1).values[0]
    assert torch.equal(flatten(aligner.forward_compress(kv, 2, top)), flatten(kv.take_tokens(best)))
