"""Bounds are tried on more cases than could ever pass by luck, on the worst ones too; maps by their own arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import contract as caches
from architectures import ARCHITECTURES
from kvferry.align.classwise import Classwise
from kvferry.align.contract import Contract, Unfitted
from kvferry.align.features import as_receiver, flatten, unflatten, with_neighbours
from kvferry.align.folder import aligner_class, load_aligner, save_aligner
from kvferry.align.identity import Identity
from kvferry.align.kv_projector_mlp import KVCacheProjectorMLP
from kvferry.align.linear import Linear
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.shipped import aligner_path
from kvferry.align.zero_pad import ZeroPad
from kvferry.cli import app
from kvferry.codec import CODECS, roundtrip
from kvferry.errors import ForeignModel, UncertifiableMap, UsageError
from kvferry.metrics.attention import Scores, attention_logits
from kvferry.metrics.attention_bound import output_bound, read_errors, total_variation_bound
from kvferry.metrics.lipschitz import SLOPES, module_norm, sequence_norm, spectral_norm
from kvferry.models.capture import capture
from kvferry.models.load import load
from kvferry.models.scores import scores_of
from kvferry.rope import rotate
from kvferry.train.cases import Asked, Case, Way
from kvferry.train.certified_layer import certify_layer, rotary_gain
from kvferry.train.certify import certify
from kvferry.train.examples import Worlds
from kvferry.train.impulse import token_map
from kvferry.train.token_map import receiver_features
from tiny import model_of, random_rows, tokens_of

SLACK = 1 + 1e-9


# The bound on attention


@st.composite
def trials(draw):
    """600 reads each: queries, keys, values, their errors, and what is seen. Everything in fp64, of any size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, dim, n_tokens = 150, draw(st.integers(1, 9)), draw(st.integers(1, 7))
    share, sizes = draw(st.sampled_from([1, 2])), st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 4.0, 30.0, 1e3])
    queries = normal(n, 2 * share, 2, dim) * draw(sizes)
    keys, values = normal(n, 2, n_tokens, dim) * draw(sizes), normal(n, 2, n_tokens, 3) * draw(sizes)
    key_errors, value_errors = normal(*keys.shape) * draw(sizes), normal(*values.shape) * draw(sizes)
    match draw(st.sampled_from(["random", "aligned", "opposite", "one slot", "none"])):
        case "aligned" | "opposite" as way:
            signs = torch.where(torch.rand(n, 2, n_tokens, 1, generator=generator) < 0.5, -1.0, 1.0)
            key_errors = queries[:, ::share, :1] * signs * key_errors.norm(dim=-1, keepdim=True)
            value_errors = values * (-2.0 if way == "opposite" else draw(st.sampled_from([0.0, 1.0])))
        case "one slot":
            key_errors[:, :, 1:] = 0
        case "none":
            key_errors, value_errors = 0 * key_errors, 0 * value_errors
        case _:
            pass
    visible = torch.rand(n, 2, n_tokens, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    sinks = normal(2 * share) if draw(st.booleans()) else None
    scores = Scores(draw(st.sampled_from([0.1, 1.0])), draw(st.sampled_from([None, 5.0])), sinks)
    return queries, (keys, values), (keys + key_errors, values + value_errors), visible, scores


@settings(max_examples=40, deadline=None)
@given(trials())
def test_no_read_moves_further_than_its_bound(trial):
    """40 times 600 reads."""
    found = read_errors(*trial)
    assert found.moved.numel() >= 600
    assert (found.total_variation <= total_variation_bound(found.shift) + 1e-12).all()
    assert (found.moved <= found.bound * SLACK + 1e-12 * found.trivial).all()
    assert (found.moved <= found.trivial * SLACK).all()


@settings(max_examples=40, deadline=None)
@given(trials())
def test_the_plain_form_holds_too_and_is_never_tighter(trial):
    """With the largest error in place of half the range, and the largest value in place of the ball around the mean."""
    queries, clean, coded, visible, scores = trial
    found = read_errors(*trial)
    errors = attention_logits(queries, coded[0], scores) - attention_logits(queries, clean[0], scores)
    largest = (errors.abs() * visible.unsqueeze(1)).amax(-1)
    share = queries.shape[1] // clean[0].shape[1]
    sizes = coded[1].norm(dim=-1).repeat_interleave(share, 1).unsqueeze(2) * visible.unsqueeze(1)
    plain = output_bound(largest, found.value_error, sizes.amax(-1))
    assert (found.shift <= largest * SLACK + 1e-12).all()
    assert (found.moved <= plain * SLACK + 1e-12 * found.trivial).all()


def two_slots(shift, gap):
    """A query of 1 on two keys `gap` apart that are pushed towards each other by `shift` each; values 1 and -1."""
    keys = torch.tensor([gap / 2, -gap / 2], dtype=torch.float64).view(1, 1, 2, 1)
    values = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    push = torch.tensor([-shift, shift], dtype=torch.float64).view(1, 1, 2, 1)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    visible = torch.ones(1, 1, 2, dtype=torch.bool)
    return read_errors(one, (keys, values), (keys + push, values), visible, Scores(1.0))


@pytest.mark.parametrize("shift", [0.01, 0.5, 2.0, 6.0])
def test_two_slots_reach_the_bound(shift):
    """The odds turn round, from e^shift to e^-shift. From even odds, p = 1/2, half of tanh(shift) is all there is."""
    found, even = two_slots(shift, shift), two_slots(shift, 0.0)
    assert found.shift.item() == pytest.approx(shift)
    assert found.total_variation.item() == pytest.approx(total_variation_bound(found.shift).item())
    assert found.moved.item() == pytest.approx(found.bound.item())
    assert even.total_variation.item() == pytest.approx(torch.tensor(shift).tanh().item() / 2)


def test_an_error_that_all_slots_share_moves_nothing():
    queries, keys, values = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    visible = torch.ones(1, 3, 5, dtype=torch.bool)
    found = read_errors(
        queries, (keys, values), (keys + 3 * torch.randn(1, 2, 1, 4), values), visible, Scores(0.5)
    )
    assert found.shift.max() < 1e-5 and found.moved.max() < 1e-5
    sunk = Scores(0.5, sinks=torch.zeros(2))
    found = read_errors(queries, (keys, values), (keys + torch.randn(1, 2, 1, 4), values), visible, sunk)
    assert found.shift.min() > 0 and found.moved.max() > 0.01


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_rotation_lengthens_no_error_beyond_its_gain(name):
    """Rotation is linear: the error of a rotated key is the rotated error. It turns, and yarn scales."""
    for layer in model_of(name).geometry.layers:
        errors, positions = torch.randn(1, 2, 50, layer.key_dim), torch.arange(50).view(1, 1, 50)
        turned = rotate(errors, positions, layer.rotary, call_length=50).norm(dim=-1) / errors.norm(dim=-1)
        gain = rotary_gain(layer.rotary, layer.key_dim, call_length=50)
        assert turned.max() <= gain + 1e-5
        if layer.rotary.dim in (0, layer.key_dim):
            assert turned.min() >= gain - 1e-5


# Lipschitz constants


def test_the_norm_of_a_matrix_is_its_largest_singular_value():
    for shape in ((3, 7), (7, 3), (1, 5)):
        matrix = torch.randn(shape)
        want = torch.linalg.matrix_norm(matrix.double(), 2).item()
        assert spectral_norm(matrix) == pytest.approx(want)
    assert spectral_norm(torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize("neighbours", [1, 2, 4])
def test_the_norm_over_sequences_bounds_the_whole_operator(neighbours):
    blocks, n_tokens = torch.randn(neighbours, 3, 5), 30
    whole = torch.zeros(n_tokens, 3, n_tokens, 5)
    for back, block in enumerate(blocks):
        for token in range(back, n_tokens):
            whole[token, :, token - back] = block
    exact = spectral_norm(whole.reshape(3 * n_tokens, 5 * n_tokens))
    assert exact <= sequence_norm(blocks) * SLACK
    assert sequence_norm(blocks) <= 2 * exact
    if neighbours == 1:
        assert sequence_norm(blocks) == pytest.approx(exact)
    assert sequence_norm(torch.stack([blocks[0]] * neighbours)) == pytest.approx(
        neighbours * spectral_norm(blocks[0])
    )


@pytest.mark.parametrize("kind", list(SLOPES), ids=lambda kind: kind.__name__)
def test_slopes_are_upper_bounds_and_tight(kind):
    forms = [kind(), nn.GELU(approximate="tanh")] if kind is nn.GELU else [kind().eval()]
    for form in forms:
        x = torch.linspace(-12, 12, 200_001, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(form(x).sum(), x)
        assert SLOPES[kind] * 0.999 <= slope.abs().max() <= SLOPES[kind]


def test_a_composition_bounds_its_own_differences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Dropout(0.5), nn.Linear(40, 5), nn.SiLU()).eval()
    x = torch.randn(4000, 6) * 3
    other = x + torch.randn(4000, 6) * torch.logspace(-3, 1, 4000).unsqueeze(-1)
    with torch.no_grad():
        stretched = (net(x) - net(other)).norm(dim=-1) / (x - other).norm(dim=-1)
    assert 0.05 * module_norm(net) < stretched.max() <= module_norm(net)


def test_what_has_no_useful_constant_is_refused_with_the_reason():
    with pytest.raises(UncertifiableMap, match=r"LayerNorm divides by the spread.*measure its error instead"):
        module_norm(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    with pytest.raises(UncertifiableMap, match="MultiheadAttention multiplies inputs"):
        module_norm(nn.MultiheadAttention(4, 2))
    with pytest.raises(UncertifiableMap, match="Softplus is not known"):
        module_norm(nn.Softplus())


def test_a_layer_norm_stretches_as_much_as_is_said_of_it():
    norm, flat = nn.LayerNorm(2, elementwise_affine=False), torch.tensor([[1.0, 1.0]])
    step = torch.tensor([[1e-5, -1e-5]])
    assert ((norm(flat + step) - norm(flat)).norm() / step.norm()).item() == pytest.approx(316, rel=0.01)


# What an aligner does to an error


def contract_between(shapes=((2, 4, 6), (1, 3, 3), (2, 4, 6)), other=caches.ORDINARY) -> Contract:
    return Contract(sender=caches.geometry(shapes), receiver=caches.geometry(other, model="ee"))


def sent(aligner, n_tokens=14, seed=0):
    shapes = [(layer.heads, layer.key_dim, layer.value_dim) for layer in aligner.contract.sender.layers]
    return caches.cache(tuple(shapes), n_tokens=n_tokens, seed=seed)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_a_linear_map_is_found_out_by_asking(neighbours):
    torch.manual_seed(0)
    aligner = Linear(contract_between(), neighbours)
    nn.init.normal_(aligner.weight)
    nn.init.normal_(aligner.bias, std=100.0)
    found = token_map(aligner, sent(aligner))
    assert found.neighbours == neighbours
    torch.testing.assert_close(found.kinds[0][0].last, aligner.weight.T, rtol=1e-4, atol=1e-4)
    keys, values = receiver_features(aligner.contract.receiver, 1)
    for some in (keys[1], values.flatten()):
        exact = torch.linalg.matrix_norm(aligner.weight[:, some].double(), 2).item()
        assert found.norm(some) == pytest.approx(exact, rel=1e-4)


def test_features_of_a_layer_are_its_own():
    kv = caches.cache(caches.RAGGED)
    for layer in range(4):
        for numbers, part in zip(receiver_features(kv.geometry, layer), kv.layer(layer), strict=True):
            assert torch.equal(flatten(kv)[0][:, numbers], part[0].transpose(0, 1))


@pytest.mark.parametrize("kind", [Identity, ZeroPad])
def test_maps_without_numbers_pass_errors_on_as_they_are(kind):
    aligner = kind(contract_between(caches.ORDINARY))
    keys, _ = receiver_features(aligner.contract.receiver, 2)
    found = token_map(aligner, sent(aligner))
    assert (found.neighbours, found.norm(keys.flatten())) == (1, 1.0)


def noisy(aligner):
    """With normal numbers in all that is fitted; deviations stay positive."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*aligner.named_parameters(), *aligner.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand(tensor.shape) + 0.5 if name.endswith("std") else torch.randn(tensor.shape)
                )
    return aligner.eval()


def with_classes(kv, seed=0):
    """The cache as if on the receiver's grid."""
    overlap = np.random.default_rng(seed).integers(0, 8, kv.n_tokens).astype(np.uint8)
    return replace(kv, spans=(replace(kv.spans[0], overlap=overlap),))


PERCEPTRONS = {
    "residual": lambda: ResidualMLP(contract_between(), 1, hidden=16),
    "residual, neighbours": lambda: ResidualMLP(contract_between(), 2, hidden=16),
    "residual, classes": lambda: ResidualMLP(contract_between(), 2, hidden=16, classes=True),
    "projector": lambda: KVCacheProjectorMLP(contract_between(), hidden_dim=16),
    "projector, neighbours": lambda: KVCacheProjectorMLP(contract_between(), neighbours=2, hidden_dim=16),
    "projector, a source twice": lambda: KVCacheProjectorMLP(
        contract_between(), sources=[[0, 0, 2]] * 3, hidden_dim=16
    ),
    "classes": lambda: Classwise(contract_between(), 2),
}


@pytest.mark.parametrize("build", list(PERCEPTRONS.values()), ids=list(PERCEPTRONS))
def test_what_is_taken_apart_bounds_the_map(build):
    aligner = noisy(build())
    kv = with_classes(sent(aligner, n_tokens=400))
    found, other = token_map(aligner, kv), kv.with_groups(sent(aligner, n_tokens=400, seed=1).groups)
    with torch.no_grad():
        wide = (with_neighbours(part, found.neighbours) for part in (kv, other))
        error, moved = torch.sub(*wide).norm(dim=-1), flatten(aligner(kv)) - flatten(aligner(other))
    for layer in range(3):
        for part in receiver_features(aligner.contract.receiver, layer):
            stretched = (moved[..., part.flatten()].norm(dim=-1) / error).max()
            assert 0.02 * found.norm(part.flatten()) < stretched <= found.norm(part.flatten())
    assert found.sequence_norm(part.flatten()) is None


AFFINE = ("bidirectional", "headwise", "hub_pair", "kv_projector", "low_rank", "map_projection", "truncate")


@pytest.mark.parametrize("name", AFFINE)
def test_every_affine_aligner_is_found_out(name):
    """The worst error that the constant allows, along the first singular vector, is stretched just so."""
    contract = contract_between(caches.ORDINARY, ((3, 2, 2), (3, 2, 2)))
    aligner = noisy(aligner_class(name)(contract, **({"rank": 5} if name == "low_rank" else {})))
    kv, keys = sent(aligner, n_tokens=13), receiver_features(contract.receiver, 1)[0].flatten()
    found = token_map(aligner, kv)
    last = found.kinds[0][0].last[keys]
    worst = torch.linalg.svd(last).Vh[0].view(found.neighbours, -1).flip(0)
    features = flatten(kv)
    features[0, -found.neighbours :] += 10 * worst
    with torch.no_grad():
        moved = flatten(aligner(kv.with_groups(unflatten(features, kv.geometry)))) - flatten(aligner(kv))
    assert (moved[0, -1, keys].norm() / 10).item() == pytest.approx(found.norm(keys), rel=1e-3)


@pytest.mark.parametrize("name", ["elastic", "kv_projector", "kv_projector_mlp"])
def test_projectors_that_normalise_are_refused(name):
    options = {} if name == "elastic" else {"output_norm": True}
    aligner = noisy(aligner_class(name)(contract_between(caches.ORDINARY), **options))
    with pytest.raises(UncertifiableMap, match="StackedNorm divides by the spread"):
        token_map(aligner, sent(aligner))


class Odd(Unfitted):
    """A map of the test's own: `change` works on features."""

    name = "odd"

    def __init__(self, change):
        super().__init__(contract_between(caches.ORDINARY))
        self.change = change

    def forward(self, kv):
        return as_receiver(kv, self.change(flatten(kv)), self.contract.receiver)


@pytest.mark.parametrize(
    "change",
    [
        torch.relu,
        lambda x: x + 1e-3 * x**2,
        lambda x: x.flip(1),
        lambda x: x.cumsum(1),
        lambda x: x * torch.arange(1.0, x.shape[1] + 1).unsqueeze(-1),
        lambda x: x * torch.nan,
    ],
    ids=["relu", "slightly bent", "backwards", "sum of all", "by place", "not a number"],
)
def test_a_map_that_is_neither_affine_nor_known_is_refused(change):
    aligner = Odd(change)
    with pytest.raises(UncertifiableMap, match="'odd' is not affine"):
        token_map(aligner, sent(aligner))


def test_a_normalising_map_is_refused_with_the_reason():
    aligner = Odd(nn.LayerNorm(48))
    with pytest.raises(UncertifiableMap, match="LayerNorm divides by the spread"):
        token_map(aligner, sent(aligner))


def test_a_map_that_gives_the_same_whatever_comes_stretches_nothing():
    aligner = Odd(lambda x: 0 * x + 5)
    assert token_map(aligner, sent(aligner)).norm(torch.arange(48)) == 0.0


# Certificates


@pytest.fixture(scope="module")
def way():
    return Way(
        load("llama"), load("gemma3"), load_aligner(aligner_path("llama", "gemma3")), CODECS.parse("int(8)")
    )


def check_holds(layer):
    assert layer.broken == 0 and layer.n_reads > 0
    assert 0 < layer.key_error <= layer.key_bound * 1.001
    assert 0 < layer.value_error <= layer.value_bound * 1.001
    assert 0 < layer.shift <= layer.shift_bound * 1.001
    assert layer.total_variation <= 1 and layer.moved <= layer.given <= layer.certified
    assert 0 <= layer.vacuous_given <= layer.vacuous_certified <= 1


@pytest.mark.parametrize("spec", ["int(bits=8)", "raw(dtype=float16)", "ecsq(step=0)"])
def test_the_certificate_of_a_shipped_aligner_holds(way, spec):
    found = certify(replace(way, codec=CODECS.parse(spec)), Worlds(), n=2)
    assert len(found.layers) == way.receiver.geometry.n_layers
    assert found.neighbours == 4 and found.n_tokens > 20
    assert 0 < found.input_error_mean <= found.input_error_max < found.input_norm_mean
    for layer in found.layers:
        check_holds(layer)
        assert layer.ratio > 1


def test_without_an_error_nothing_moves_and_the_certificate_says_so(way):
    found = certify(replace(way, codec=CODECS.parse("raw")), Worlds(), n=2)
    assert found.input_error_max == 0.0
    assert all((row.moved, row.given, row.certified, row.ratio) == (0, 0, 0, None) for row in found.layers)
    assert found.attention_cosine == found.attention_cosine_coded
    assert not found.vacuous


def test_a_finer_codec_certifies_less_movement(way):
    coarse, fine = (
        certify(replace(way, codec=CODECS.parse(f"int(bits={b})")), Worlds(), n=2) for b in (2, 8)
    )
    assert all(a.certified > b.certified for a, b in zip(coarse.layers, fine.layers, strict=True))
    assert coarse.vacuous and not fine.vacuous


def test_a_model_and_itself_read_alike(way):
    own = Contract(sender=way.receiver.geometry, receiver=way.receiver.geometry)
    found = certify(Way(way.receiver, way.receiver, Identity(own), way.codec), Worlds(), n=2)
    assert found.attention_cosine == pytest.approx(1.0, abs=1e-5) and found.attention_error < 1e-4
    assert 0.9 < found.attention_cosine_coded < 1.0
    assert all(layer.lipschitz_k == pytest.approx(1.0, rel=1e-4) for layer in found.layers)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama-yarn", "mistral-sliding", "smollm3", "granite"])
def test_soft_caps_sinks_windows_and_scaled_rotation_are_bounded_too(name):
    model, tokens = model_of(name), tokens_of(random_rows(2, 18))
    found = capture(model, tokens, ("queries_rotated",))
    slots, queries = torch.arange(13), tuple(layer[:, :, 13:] for layer in found.evidence.queries_rotated)
    kv, at = found.kv.take_tokens(slots), found.kv.positions[0, :, 13:]
    coded, mask = roundtrip(CODECS.parse("int(bits=4)"), kv), torch.ones_like(at, dtype=torch.bool)
    asked, wrong = Asked(kv, queries, at, mask), Asked(coded, queries, at, mask)
    aligner = Identity(Contract(sender=model.geometry, receiver=model.geometry))
    through, error = token_map(aligner, kv), (flatten(coded) - flatten(kv)).norm(dim=-1)
    for layer, scores in enumerate(scores_of(model)):
        check_holds(certify_layer(layer, scores, through, [Case(kv, coded, asked, wrong, asked)], [error]))


def test_a_perceptron_between_real_models_holds(way):
    torch.manual_seed(0)
    aligner = ResidualMLP(way.aligner.contract, neighbours=2, hidden=8, folded=True)
    for parameter in aligner.parameters():
        nn.init.normal_(parameter, std=0.05)
    for layer in certify(replace(way, aligner=aligner), Worlds(), n=2).layers:
        check_holds(layer)


def test_on_the_receivers_grid_the_worst_class_counts(way):
    torch.manual_seed(0)
    aligner = Classwise(replace(way.aligner.contract, grid="receiver", stride=1.0))
    nn.init.normal_(aligner.weight, std=0.05)
    found = certify(replace(way, aligner=aligner), Worlds(), n=2)
    for index, layer in enumerate(found.layers):
        check_holds(layer)
        keys = receiver_features(way.receiver.geometry, index)[0].flatten()
        largest = torch.linalg.matrix_norm(aligner.weight.detach()[:, :, keys].double(), 2).max().item()
        assert layer.lipschitz_k == pytest.approx(largest, rel=1e-4) and layer.sequence_k is None


def test_foreign_models_and_no_texts_are_refused(way):
    with pytest.raises(ForeignModel, match="receiver"):
        certify(replace(way, receiver=way.sender), Worlds(), n=2)
    with pytest.raises(ForeignModel, match="model"):
        certify(replace(way, sender=way.receiver), Worlds(), n=2)
    with pytest.raises(UsageError, match="0 texts"):
        certify(way, Worlds(), n=0)


def certified(*words):
    return CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(app, ["certify", *words])


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "certificate.json"
    done = certified("llama-to-gemma3", "--codec", "int(bits=2)", "--n", "2", "--json", str(out))
    assert done.exit_code == 0
    assert "not covered" in done.stdout and "VACUOUS" in done.stdout
    found = json.loads(out.read_text())
    assert found["vacuous"] and not found["covered"]
    assert [row["broken"] for row in found["layers"]] == [0] * 4
    assert all(row["ratio"] == row["certified"] / row["moved"] for row in found["layers"])


def test_the_command_says_of_how_many_reads_it_says_something():
    done = certified("llama-to-gemma3", "--codec", "raw", "--n", "1")
    assert done.exit_code == 0
    assert "says something of 100%" in done.stdout


def test_the_command_refuses_with_a_cure(tmp_path):
    assert "Known: llama-to-gemma3" in certified("nix").output
    assert "Give --receiver" in certified("llama-to-qwen3").output
    save_aligner(Linear(contract_between()), tmp_path / "foreign", "")
    done = certified(str(tmp_path / "foreign"))
    assert done.exit_code == 1 and "Fit an aligner for this pair" in done.output
