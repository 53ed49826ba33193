"""Maps between layers: what every rule keeps, what each one is for, and how weights between layers are learned."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract import check_spec
from kvferry.align import layer_map
from kvferry.align.layer_map import LAYER_MAPS, Depths, LayerMap, Sources, distances
from kvferry.align.layer_weights import LayerWeights, softmax_of_highest, sparsemax
from kvferry.errors import BadSpec, ShapeMismatch, UnknownName, UsageError

GEOMETRIC = (
    "terminal",
    "last_aligned",
    "nearest_depth",
    "nearest_depth(k=3)",
    "ratio",
    "uniform",
    "skip",
    "all",
)
ONE_TO_ONE = ("terminal", "last_aligned", "nearest_depth", "ratio", "uniform", "skip")
SPECS = (*GEOMETRIC, "top_k_sources(k=2)", "learned")
COUNTS = st.tuples(st.integers(1, 40), st.integers(1, 40))


def sources(spec: str, n_sender: int, n_receiver: int) -> Sources:
    """With errors and weights for the rules that need some."""
    generator = torch.Generator().manual_seed(n_sender + 100 * n_receiver)
    errors, logits = (torch.randn(n_receiver, n_sender, generator=generator) for _ in range(2))
    return LAYER_MAPS.parse(spec)(Depths(n_sender, n_receiver, errors, sparsemax(logits)))


@pytest.mark.parametrize("spec", SPECS)
@given(counts=COUNTS)
def test_every_receiver_layer_has_a_row_of_sender_layers_in_order(spec, counts):
    n_sender, n_receiver = counts
    found = sources(spec, n_sender, n_receiver)
    assert len(found) == n_receiver
    for row in found:
        assert list(row) == sorted({*row}) and {*row} <= {*range(n_sender)}
    if spec != "terminal":
        assert all(found)


@pytest.mark.parametrize("spec", GEOMETRIC)
@given(counts=COUNTS)
def test_later_layers_never_read_earlier_ones(spec, counts):
    rows = [row for row in sources(spec, *counts) if row]
    for one, after in pairwise(rows):
        assert one[0] <= after[0] and one[-1] <= after[-1]


@pytest.mark.parametrize("spec", ONE_TO_ONE)
@given(n=st.integers(1, 40))
def test_equal_depths_are_the_identity(spec, n):
    assert sources(spec, n, n) == tuple((layer,) for layer in range(n))


@given(counts=COUNTS)
def test_ends_meet_where_a_rule_says_so(counts):
    n_sender, n_receiver = counts
    for spec in ("terminal", "last_aligned", "nearest_depth"):
        assert sources(spec, *counts)[-1] == (n_sender - 1,)
    for spec in ("ratio", "skip"):
        assert sources(spec, *counts)[0] == (0,)
    if n_receiver > 1:
        assert sources("nearest_depth", *counts)[0] == (0,)
    assert sum(map(bool, sources("terminal", *counts))) == min(counts)


@given(counts=COUNTS)
def test_uniform_reads_every_layer_once_where_it_can(counts):
    n_sender, n_receiver = counts
    read = [layer for row in sources("uniform", *counts) for layer in row]
    assert {*read} == {*range(n_sender)}
    if n_sender >= n_receiver:
        assert read == list(range(n_sender))
        sizes = [len(row) for row in sources("uniform", *counts)]
        assert max(sizes) - min(sizes) <= 1


def test_last_aligned_is_clamped_as_published():
    """Figures of the published code: five, then thirteen, of 28 layers read layer 0; 28 of 36 never reads 0 to 7."""
    assert sources("last_aligned", 24, 28)[:6] == ((0,),) * 5 + ((1,),)
    assert sources("last_aligned", 16, 28)[:14] == ((0,),) * 13 + ((1,),)
    assert sources("last_aligned", 36, 28)[0] == (8,)
    assert sources("terminal", 24, 28)[:5] == ((),) * 4 + ((0,),)
    assert sources("terminal", 36, 28) == sources("last_aligned", 36, 28)


@given(counts=COUNTS, k=st.integers(1, 5))
def test_nearest_depth_is_nearest(counts, k):
    n_sender, apart = counts[0], distances(*counts)
    for row, chosen in zip(apart, sources(f"nearest_depth(k={k})", *counts), strict=True):
        others = [layer for layer in range(n_sender) if layer not in chosen]
        assert len(chosen) == min(k, n_sender)
        assert not others or row[list(chosen)].max() <= row[others].min()


def test_small_cases_by_hand():
    assert sources("nearest_depth", 2, 3) == ((0,), (0,), (1,))  # the middle one is as near to both
    assert sources("ratio", 3, 5) == ((0,), (0,), (1,), (1,), (2,))
    assert sources("skip", 7, 3) == ((0,), (2,), (4,))
    assert sources("skip", 2, 4) == ((0,), (1,), (1,), (1,))
    assert sources("uniform", 2, 4) == ((0,), (0,), (1,), (1,))
    assert sources("all", 2, 1) == ((0, 1),)


def test_top_k_takes_the_smallest_errors():
    errors = torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.5, 0.5], [float("nan"), 2.0, 1.0]])
    rule = LAYER_MAPS.parse("top_k_sources(k=2)")
    assert rule(Depths(3, 3, errors=errors)) == ((1, 2), (0, 1), (1, 2))
    assert LAYER_MAPS.parse("top_k_sources(9)")(Depths(3, 3, errors=errors)) == ((0, 1, 2),) * 3


@pytest.mark.parametrize("spec", [*SPECS, "nearest_depth(k=2)"])
def test_a_rule_is_its_spec(spec):
    check_spec(LAYER_MAPS, LAYER_MAPS.parse(spec))


def test_every_rule_is_in_the_table():
    rules = [
        found for found in vars(layer_map).values() if isinstance(found, type) and issubclass(found, LayerMap)
    ]
    assert sorted(rule.name for rule in rules if rule is not LayerMap) == LAYER_MAPS.names()
    assert all(LAYER_MAPS.get(rule.name) is rule for rule in rules if rule is not LayerMap)


def test_what_cannot_be_mapped_is_refused():
    with pytest.raises(UnknownName, match="'terminal'"):
        LAYER_MAPS.parse("terminl")
    with pytest.raises(UnknownName, match="'k'"):
        LAYER_MAPS.parse("terminal(k=2)")
    for spec in ("top_k_sources(k=0)", "nearest_depth(k=-1)", "top_k_sources(k=x)"):
        with pytest.raises(BadSpec):
            LAYER_MAPS.parse(spec)
    with pytest.raises(UsageError, match="layer_errors"):
        LAYER_MAPS.parse("top_k_sources")(Depths(3, 3))
    with pytest.raises(UsageError, match="LayerWeights"):
        LAYER_MAPS.parse("learned")(Depths(3, 3))
    with pytest.raises(ShapeMismatch, match="errors"):
        Depths(3, 2, errors=torch.zeros(3, 2))
    with pytest.raises(UsageError, match="0 receiver"):
        Depths(3, 0)
    with pytest.raises(UsageError, match="0 active"):
        LayerWeights(3, 3, active=0)


def nearest_on_simplex(logits: torch.Tensor) -> torch.Tensor:
    """By bisection of the threshold, in fp64."""
    low, high = logits.min() - 1, logits.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (logits - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (logits - low).clamp(min=0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_sparsemax_is_the_nearest_point_of_the_simplex(numbers):
    logits = torch.tensor(numbers, dtype=torch.float64)
    assert torch.allclose(sparsemax(logits), nearest_on_simplex(logits), atol=1e-9)


def test_sparsemax_has_the_right_gradient():
    logits = torch.tensor([[0.4, 0.1, -2.0], [0.2, 0.3, 0.25]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, (logits,))
    kept = logits[:, :2].detach()
    assert torch.allclose(softmax_of_highest(logits, 2)[0], torch.cat([kept[0].softmax(0), torch.zeros(1)]))


@pytest.mark.parametrize("active", [None, 1, 3, 99])
@given(counts=COUNTS)
def test_learned_weights_are_shares_and_start_near_the_same_depth(active, counts):
    weights = LayerWeights(*counts, active=active)()
    assert weights.shape == counts[::-1] and (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(counts[1]))
    apart = distances(*counts)
    assert torch.equal(apart.gather(1, weights.argmax(-1, keepdim=True))[:, 0], apart.amin(-1))
    if active is not None:
        assert ((weights > 0).sum(-1) == min(active, counts[0])).all()


@pytest.mark.parametrize("active", [None, 2])
def test_learning_finds_the_layers_that_were_mixed_and_leaves_the_others_at_zero(active):
    """Receiver layer t is made of sender layers t and t + 2."""
    layers = torch.randn(6, 200, 5)
    truth = torch.zeros(4, 6)
    for receiver in range(4):
        truth[receiver, [receiver, receiver + 2]] = torch.tensor([0.7, 0.3])
    target = torch.tensordot(truth, layers, dims=1)
    learned = LayerWeights(6, 4, active)
    if active is not None:  # it weighs the highest, and layers that never were among them get no gradient
        learned.logits.data.copy_(truth.sign())
    optimizer = torch.optim.Adam(learned.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (learned.mix(layers) - target).square().mean().backward()
        optimizer.step()
    assert torch.allclose(learned(), truth, atol=0.02)
    found = LAYER_MAPS.parse("learned")(Depths(6, 4, weights=learned().detach()))
    assert json.loads(json.dumps(found)) == [[0, 2], [1, 3], [2, 4], [3, 5]]
