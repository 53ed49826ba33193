"""A map for each overlap class: the algebra of its closed form, and that it beats one map for all on real models."""

from itertools import islice

import pytest
import torch

import contract
from kvferry.align.classwise import SHARED, Classwise, by_class, scaled
from kvferry.align.contract import Contract
from kvferry.align.features import flatten, with_neighbours
from kvferry.align.linear import Linear
from kvferry.align.receiver_grid import N_CLASSES, classes_of
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.ridge import Sums, solve
from kvferry.codec import CODECS
from kvferry.errors import GridMismatch, UsageError
from kvferry.metrics.paired import paired
from kvferry.models.load import load
from kvferry.train.closed import fresh, solve_into
from kvferry.train.examples import Worlds
from kvferry.train.paired import Pairs, collect
from kvferry.train.route import Route
from kvferry.train.scores import behind, score

SENDER = contract.geometry(((1, 2, 1),))
RECEIVER = contract.geometry(((1, 1, 1),), model="ef")
BETWEEN = Contract(SENDER, RECEIVER, grid="receiver")


def pairs_of_classes(n_tokens: int = 400) -> tuple[list[Sums], list[torch.Tensor]]:
    """Each class has an affine map of its own, without noise; the last class was never seen."""
    sums, maps = [], []
    for index in range(N_CLASSES):
        x, weight = torch.randn(n_tokens if index < N_CLASSES - 1 else 0, 3), torch.randn(3, 2)
        sums.append(Sums.of(x, x @ weight + index))
        maps.append(weight)
    return sums, maps


def test_each_class_gets_its_own_map_drawn_a_little_to_that_of_all():
    sums, maps = pairs_of_classes()
    aligner = Classwise(BETWEEN)
    aligner.solve_from(sums, 1e-9)
    total = sum(sums[1:], sums[0])
    for index in range(N_CLASSES - 1):
        weight, bias = solve(sums[index] + scaled(total, SHARED), 1e-9)
        assert torch.equal(aligner.weight[index], weight) and torch.equal(aligner.bias[index], bias)
        alone, shared = (
            (aligner.weight[index] - other).norm() for other in (maps[index], solve(total, 1e-9)[0])
        )
        assert alone < shared
    assert torch.allclose(aligner.weight[-1], solve(total, 1e-9)[0], atol=1e-5), "never seen: the map of all"


def test_classes_of_one_map_give_that_map():
    x, weight = torch.randn(400, 3), torch.randn(3, 2)
    aligner = Classwise(BETWEEN)
    aligner.solve_from([Sums.of(x[i::8], x[i::8] @ weight + 1) for i in range(N_CLASSES)], 1e-9)
    for own, bias in zip(aligner.weight, aligner.bias, strict=True):
        assert torch.allclose(own, weight, atol=1e-5)
        assert torch.allclose(bias, torch.ones(2), atol=1e-5)


def test_scaled_sums_are_those_of_a_token_repeated():
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    sums, thrice = Sums.of(x, y), Sums.of(x.repeat(3, 1), y.repeat(3, 1))
    found = scaled(sums, 3)
    for name in ("n", "x", "y", "xx", "xy", "yy"):
        assert torch.allclose(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(thrice, name)))


def test_every_token_goes_through_the_map_of_its_class():
    wide, classes = torch.randn(2, 5, 3), torch.randint(0, N_CLASSES, (2, 5))
    weight, bias = torch.randn(N_CLASSES, 3, 2), torch.randn(N_CLASSES, 2)
    got = by_class(wide, classes, weight, bias)
    for row in range(2):
        for token in range(5):
            own = classes[row, token]
            wanted = wide[row, token] @ weight[own] + bias[own]
            assert torch.allclose(got[row, token], wanted, atol=1e-6)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Most tokens of the worlds are pooled from one, some from two, three or more."""
    route = Route(load("llama"), load("gemma3"), "receiver")
    texts = [example.context for example in islice(Worlds().examples("train", 0), 128)]
    return collect(route, texts, [CODECS.parse("raw(float16)").roundtrip])


@pytest.fixture(scope="module")
def between() -> Contract:
    sender, receiver = (load(name).geometry for name in ("llama", "gemma3"))
    return Contract(sender, receiver, grid="receiver")


def test_it_beats_one_map_for_all_where_tokenizers_differ(pairs, between):
    """Held-out nats of what the receiver says, example by example."""
    route = Route(load("llama"), load("gemma3"), "receiver")
    test = list(islice(Worlds().examples("test", 0), 64))
    judged = []
    for spec in ("classwise", "linear"):
        aligner = fresh(spec, between, pairs, lambda: pairs.sums)
        solve_into(aligner, pairs, 1e-5)
        judged += behind(aligner, [CODECS.parse("raw(float16)")])
    by_class_, alone = score(route, judged, test)
    assert paired(-by_class_.nats, -alone.nats).verdict == "a better"
    assert by_class_.loss < alone.loss - 0.05


def test_a_perceptron_with_classes_starts_at_the_map_of_classes(pairs, between):
    kv = Route(load("llama"), load("gemma3"), "receiver").sent(["Ann has 12 teas in Oslo.", "Ben."])
    classwise, residual = Classwise(between), ResidualMLP(between, neighbours=1, hidden=4, classes=True)
    classwise.solve_from(pairs.classes, 1e-2)
    residual.start_from_classes(pairs.classes, 1e-2)
    wanted = flatten(classwise(kv))[kv.present[0]]
    for aligner in (residual, residual.fold()):
        assert torch.allclose(flatten(aligner(kv))[kv.present[0]], wanted, atol=2e-3)


def test_folding_keeps_a_trained_map(between):
    kv = Route(load("llama"), load("gemma3"), "receiver").sent(["Ann has 12 teas in Oslo."])
    residual = ResidualMLP(between, neighbours=1, hidden=4, classes=True)
    for tensor in (*residual.parameters(), *residual.buffers()):
        torch.nn.init.normal_(tensor, std=0.1)
    folded = residual.fold()
    assert folded.options() == {**residual.options(), "folded": True}
    assert torch.allclose(flatten(folded(kv)), flatten(residual(kv)), atol=1e-4)
    wide, classes = with_neighbours(kv, 1), classes_of(kv)
    assert torch.allclose(folded.map(wide, classes), flatten(folded(kv)), atol=1e-6)
    for given in (residual, folded):
        with pytest.raises(GridMismatch, match="with classes"):
            given.map(wide)
    with pytest.raises(GridMismatch, match="without classes"):
        ResidualMLP(between, neighbours=1, hidden=4).map(wide, classes)


@pytest.mark.parametrize("spec", ["classwise", "residual_mlp(neighbours=1, hidden=4, classes=True)"])
def test_the_senders_own_grid_is_refused(between, spec):
    """When it is fitted, and when it is used."""
    sums = Sums.of(torch.randn(9, between.sender.floats_per_token), torch.randn(9, 512))
    aligner = fresh(spec, between, Pairs(1, [sums]), lambda: sums)
    with pytest.raises(UsageError, match="grid=receiver"):
        solve_into(aligner, Pairs(1, [sums]), 1e-2)
    with pytest.raises(GridMismatch, match="sender's own tokens"):
        aligner(Route(load("llama"), load("gemma3")).sent(["Ann has tea."]))


def test_one_map_does_not_ask_for_classes(pairs, between):
    linear = Linear(between)
    solve_into(linear, pairs, 1e-2)
    assert torch.equal(linear.weight, solve(pairs.sums, 1e-2)[0])
