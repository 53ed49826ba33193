"""A hub: models that share a space, in closed form, by joining and by training."""

import pytest
import torch

from contract import cache, geometry
from kvferry.align.contract import Contract
from kvferry.align.features import flatten, unflatten
from kvferry.align.folder import load_aligner, save_aligner
from kvferry.align.hub import Hub, found
from kvferry.align.hub_pair import HubPair
from kvferry.align.ridge import Sums
from kvferry.errors import CodecNotCovered, ShapeMismatch, UsageError

SHAPES = {
    "small": ((1, 3, 4), (1, 3, 4)),
    "large": ((2, 5, 3), (2, 4, 4)),
    "qwen2.5-7b": ((3, 4, 2), (1, 2, 2)),
}
GEOMETRIES = {
    name: geometry(shapes, model=digits)
    for (name, shapes), digits in zip(SHAPES.items(), ("ab", "cd", "ef"), strict=True)
}
LATENT = 6


def readings(n_tokens=500, noise=0.05, seed=0):
    """Features of every model for the same tokens: other views of one latent, in other units."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.Generator().manual_seed(7)
    latent = torch.randn(n_tokens, LATENT, generator=generator)
    found = {}
    for number, (name, one) in enumerate(GEOMETRIES.items()):
        width = one.floats_per_token
        features = latent @ torch.randn(LATENT, width, generator=views)
        features = features + noise * torch.randn(n_tokens, width, generator=generator)
        found[name] = 10.0**number * features + number
    return found


def hub_of(names, dim=LATENT, penalty=1e-4):
    features = torch.cat([readings()[name] for name in names], -1)
    return found({name: GEOMETRIES[name] for name in names}, Sums.of(features, features), dim, penalty)


def error(hub, sender, receiver):
    """Of held-out tokens, in units of each channel's variance."""
    told = readings(seed=1)
    got, want = hub.decode(receiver, hub.encode(sender, told[sender])), told[receiver]
    return float(((got - want).square().mean(0) / want.var(0)).mean())


@torch.no_grad()
def test_one_model_alone_is_the_best_linear_autoencoder():
    features = readings(noise=1.0)["small"]
    even = (features - features.mean(0)) / features.std(0, correction=0)
    for dim in (2, 5, 14):
        hub = found({"small": GEOMETRIES["small"]}, Sums.of(features, features), dim, 0.0)
        back = hub.decode("small", hub.encode("small", features))
        lost = ((back - features) / features.std(0, correction=0)).square().sum() / len(features)
        want = torch.linalg.eigvalsh(even.T @ even / len(even)).flip(0)[dim:].sum()
        assert torch.allclose(lost, want, rtol=1e-3, atol=1e-4)
        codes = hub.encode("small", features)
        assert torch.allclose(codes.T @ codes / len(codes), torch.eye(dim), atol=1e-2)


@torch.no_grad()
def test_models_that_share_a_latent_understand_each_other_over_it():
    hub = hub_of(["small", "large", "qwen2.5-7b"])
    assert all(error(hub, one, other) < 0.02 for one in SHAPES for other in SHAPES)
    narrow = hub_of(["small", "large", "qwen2.5-7b"], dim=2)
    assert error(narrow, "small", "large") > 0.2


@torch.no_grad()
def test_a_model_joins_and_the_others_stay_as_they_are():
    hub = hub_of(["small", "large"])
    before = {name: tensor.clone() for name, tensor in hub.state_dict().items()}
    told, name = readings(), "qwen2.5-7b"
    codes = hub.encode("small", told["small"])
    hub.join(name, GEOMETRIES[name], Sums.of(told[name], codes), Sums.of(codes, told[name]), 1e-4)
    assert hub.names == ["small", "large", name]
    assert all(torch.equal(hub.state_dict()[key], tensor) for key, tensor in before.items())
    assert error(hub, name, "large") < 0.02 and error(hub, "large", name) < 0.02  # never seen together


def test_a_newcomer_is_trained_while_the_others_are_frozen():
    hub, told = hub_of(["small", "large"]), readings()
    one = GEOMETRIES["qwen2.5-7b"]
    hub.add("qwen2.5-7b", HubPair(Contract(one, one), LATENT))
    hub.train_only("qwen2.5-7b")
    trained = [parameter for parameter in hub.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in hub.member("qwen2.5-7b").parameters()}
    even = {name: (features - features.mean(0)) / features.std(0) for name, features in told.items()}
    told["qwen2.5-7b"] = even["qwen2.5-7b"]
    optimizer, losses = torch.optim.Adam(trained, 1e-2), []
    for _ in range(60):
        losses.append(hub.loss(told))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0].detach()


def test_the_map_between_two_members_is_a_folder_of_its_own(tmp_path):
    hub = hub_of(["small", "large"])
    pair = hub.aligner("small", "large", coded_with=("raw(dtype=float16, zstd=0)",), stride=1.25)
    kv = cache(SHAPES["small"], 5, 2)
    want = hub.decode("large", hub.encode("small", flatten(kv)))
    save_aligner(pair, tmp_path / "pair", card="")
    again = load_aligner(tmp_path / "pair")
    assert torch.equal(flatten(again(kv)), want)
    assert again.contract.stride == 1.25
    with pytest.raises(CodecNotCovered):
        again.require_codec("int(bits=4)")
    torch.nn.init.zeros_(pair.encoder.weight)  # a copy
    assert torch.equal(hub.decode("large", hub.encode("small", flatten(kv))), want)


def test_a_hub_is_kept_as_one_folder_per_member(tmp_path):
    hub = hub_of(["small", "large"])
    again = Hub(LATENT)
    for name in hub.names:
        save_aligner(hub.member(name), tmp_path / name, card="")
        again.add(name, load_aligner(tmp_path / name))
    told = readings(5)["small"]
    assert torch.equal(
        again.decode("large", again.encode("small", told)), hub.decode("large", hub.encode("small", told))
    )


def test_absent_tokens_stay_absent():
    hub = hub_of(["small", "large"])
    kv = cache(SHAPES["small"], 4)
    present = kv.present.clone()
    present[0, 0, 2] = False
    kv = type(kv)(kv.geometry, unflatten(flatten(kv), kv.geometry), present, kv.positions, kv.spans)
    mapped = hub.aligner("small", "large")(kv)
    assert mapped.present.tolist() == [[[True, True, False, True]]] * 2


def test_what_cannot_join_is_refused():
    hub, one = hub_of(["small"]), GEOMETRIES["large"]
    with pytest.raises(UsageError, match="'large' is no member"):
        hub.member("large")
    with pytest.raises(UsageError, match="codes of 5 channels"):
        hub.add("large", HubPair(Contract(one, one), 5))
    with pytest.raises(UsageError, match="cannot join"):
        hub.add("small", hub.member("small"))
    features = readings()["small"]
    with pytest.raises(UsageError, match="codes of 15 channels"):
        found({"small": GEOMETRIES["small"]}, Sums.of(features, features), 15, 1e-3)
    with pytest.raises(ShapeMismatch, match="for models of"):
        found({"large": one}, Sums.of(features, features), 2, 1e-3)
