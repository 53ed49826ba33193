"""Profiles: files that are refused, what is in the hash, how they are fitted, and what shaping is good for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from typer.testing import CliRunner

import contract
from kvferry.cli import app
from kvferry.codec import decode, roundtrip
from kvferry.codec.ecsq import Ecsq, layout
from kvferry.codec.ecsq.weights import exponents, read_weights
from kvferry.codec.profile import SECTIONS, Profile, load_profile, save_profile
from kvferry.codec.profiles import find_profile, hold
from kvferry.errors import FolderError, ForeignModel, ForeignProfile, UsageError
from kvferry.kv import KV, Geometry
from kvferry.lab.drift import contexts
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.load import load
from kvferry.session.sender import Sender
from kvferry.train.examples import Worlds
from kvferry.train.profile import ProfileRecipe, fit_profile
from kvferry.train.profile import _factors as factors
from kvferry.train.profile import _weights as weights_of
from kvferry.wire import SegmentType, pack, unpack
from paths import on_both
from profiles import held_profile

GEOMETRY = contract.geometry(((2, 3, 4), (1, 2, 2)))
PROFILE = held_profile(GEOMETRY)
METADATA = {
    "format": "kvferry.profile/1",
    "sections": "deviation mean shaping weight",
    "fitted": "{}",
    "model": "ab" * 32,
    "geometry": GEOMETRY.shape_digest(),
    "tokenizer": "cd" * 32,
}
TENSORS = {name: getattr(PROFILE, name) for name in SECTIONS}
TINY = ProfileRecipe(n_contexts=3, draws=1, batch_size=3)


def test_a_file_holds_all_of_a_profile(tmp_path):
    fitted = replace(PROFILE, fitted={"seed": 3, "source": "worlds"})
    save_profile(fitted, tmp_path / "a")
    came = load_profile(tmp_path / "a")
    assert came.digest == PROFILE.digest
    assert came.fitted == fitted.fitted
    for name, numbers in TENSORS.items():
        assert getattr(came, name).dtype == numbers.dtype
        assert (getattr(came, name) == numbers).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_hash_is_of_every_number_and_of_the_sender_alone():
    assert replace(PROFILE, fitted={"a": 1}).digest == PROFILE.digest
    others = [replace(PROFILE, **{name: "ee" * 32}) for name in ("model", "geometry", "tokenizer")]
    for name, numbers in TENSORS.items():
        for index in range(len(numbers)):
            changed = numbers.copy()
            changed[index] += 1
            others.append(replace(PROFILE, **{name: changed}))
    assert len({PROFILE.digest, *(one.digest for one in others)}) == 1 + len(others)
    assert PROFILE.name == f"p{PROFILE.wire_hash:016x}"


def without(name: str) -> dict[str, np.ndarray]:
    return {other: numbers for other, numbers in TENSORS.items() if other != name}


def nan(name: str, value: float = float("nan")) -> dict[str, np.ndarray]:
    numbers = TENSORS[name].copy()
    numbers[1] = value
    return {**TENSORS, name: numbers}


ONE = np.zeros(1, np.float32)
BAD_FILES = {
    "no metadata": (TENSORS, {}),
    "another format": (TENSORS, {**METADATA, "format": "kvferry.profile/2"}),
    "no model": (TENSORS, {key: text for key, text in METADATA.items() if key != "model"}),
    "fitted is no JSON": (TENSORS, {**METADATA, "fitted": "{"}),
    "fitted is no object": (TENSORS, {**METADATA, "fitted": "[1]"}),
    "a section is missing": (without("weight"), METADATA),
    "and is not declared": (without("weight"), {**METADATA, "sections": "deviation mean shaping"}),
    "declared twice": (TENSORS, {**METADATA, "sections": "deviation mean mean shaping weight"}),
    "not declared": (TENSORS, {**METADATA, "sections": ""}),
    "unknown section": ({**TENSORS, "colour": ONE}, METADATA),
    "reserved section": ({**TENSORS, "basis": ONE}, METADATA),
    "reserved, declared": (TENSORS, {**METADATA, "sections": METADATA["sections"] + " metric_of"}),
    "wrong dtype": ({**TENSORS, "weight": PROFILE.weight.astype(np.int32)}, METADATA),
    "half the precision": ({**TENSORS, "mean": PROFILE.mean.astype(np.float16)}, METADATA),
    "two axes": ({**TENSORS, "mean": PROFILE.mean[None]}, METADATA),
    "no axes": ({**TENSORS, "shaping": np.float16(1)[None][0:1].reshape(())}, METADATA),
    "other lengths": ({**TENSORS, "mean": PROFILE.mean[1:]}, METADATA),
    "a mean is NaN": (nan("mean"), METADATA),
    "shaping is infinite": (nan("shaping", float("inf")), METADATA),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_is_refused(name, tmp_path):
    tensors, metadata = BAD_FILES[name]
    save_file(tensors, tmp_path / "a", metadata or None)
    with pytest.raises(FolderError) as caught:
        load_profile(tmp_path / "a")
    assert ("newer" in caught.value.cure) == ("reserved" in name)


def test_bytes_that_are_no_profile(tmp_path):
    file = tmp_path / "a"
    save_profile(PROFILE, file)
    whole = file.read_bytes()
    for data in (b"", b"junk", 64 * b"\xff", *(whole[:n] for n in range(0, len(whole), 37))):
        file.write_bytes(data)
        with pytest.raises(FolderError, match="cannot read the profile"):
            load_profile(file)
    save_torch(
        {**{name: torch.zeros(2) for name in SECTIONS}, "mean": torch.zeros(2).bfloat16()}, file, METADATA
    )
    for path in (file, tmp_path, tmp_path / "missing"):
        with pytest.raises(FolderError):
            load_profile(path)
    with pytest.raises(FolderError, match="there is no profile"):
        find_profile(str(tmp_path / "missing"))


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        save_profile(PROFILE, tmp_path / "missing" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        save_profile(PROFILE, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_another_sender():
    kv, codec = contract.cache(((2, 3, 4), (1, 2, 2))), Ecsq(profile=PROFILE.name)
    frame = codec.encode(kv)
    geometry = kv.geometry
    for other in (
        replace(geometry, model="ee" * 32),
        replace(geometry, tokenizer="ee" * 32),
        contract.geometry(((2, 3, 4), (1, 2, 3))),
    ):
        with pytest.raises(ForeignModel):
            PROFILE.require_sender(other)
        with pytest.raises(ForeignModel):
            decode(frame, other)
    with pytest.raises(ForeignModel, match="fitted for model"):
        codec.encode(replace(kv, geometry=replace(geometry, model="ee" * 32)))
    with pytest.raises(FolderError, match="channels"):
        replace(
            PROFILE, **{name: TENSORS[name][1:] for name in ("mean", "deviation", "weight")}
        ).require_sender(geometry)


def test_a_hash_that_is_not_held():
    kv = contract.cache(((2, 3, 4), (1, 2, 2)))
    with pytest.raises(ForeignProfile, match="not at hand"):
        find_profile("p" + 16 * "0")
    with pytest.raises(ForeignProfile, match="not at hand"):
        decode(replace(Ecsq(profile=PROFILE.name).encode(kv), profile_hash=1), kv.geometry)


@settings(max_examples=30)
@given(
    contract.recipes().map(lambda recipe: replace(recipe, space="content", scale=min(recipe.scale, 1.0))),
    st.sampled_from([-200, -64, 100]),
)
def test_both_paths_agree_and_a_message_is_its_roundtrip(recipe, step):
    """To the bit, shaping too: one example has one head and one token, another several."""
    kv = recipe.build()
    codec = Ecsq(step, profile=held_profile(kv.geometry).name)

    def coded() -> tuple[bytes, list[bytes]]:
        data = pack(codec.encode(kv))
        came = decode(unpack(data), kv.geometry)
        (through,) = roundtrip(codec, kv).sequences()
        contract.same(replace(came, spans=through.spans), through)
        return data, [tensor.numpy().tobytes() for g in came.groups for tensor in (g.keys, g.values)]

    plain, fast = on_both(coded)
    assert plain == fast


# Fitting


def fisher(heads: int, dim: int, seed: int) -> np.ndarray:
    """Correlated, and of very different size from channel to channel."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(heads, 3 * dim, dim)) @ generator.normal(size=(heads, dim, dim))
    root *= 2.0 ** generator.uniform(-2, 2, (heads, 1, dim))
    return root.transpose(0, 2, 1) @ root


@pytest.mark.parametrize("seed", range(4))
def test_the_factors_of_a_matrix(seed):
    matrix, recipe = fisher(3, 6, seed), ProfileRecipe(floor=0.1, ridge=0.2)
    shaping, felt = factors(matrix, recipe)
    assert (np.triu(shaping, 1) == 0).all()
    assert np.allclose(np.diagonal(shaping, axis1=1, axis2=2), 1)
    again = shaping.transpose(0, 2, 1) @ (felt[..., None] * shaping)
    diagonal = np.diagonal(matrix, axis1=1, axis2=2)
    added = 0.1 * diagonal.mean() + 0.2 * diagonal
    assert np.allclose(again, matrix + added[..., None] * np.eye(6), rtol=1e-9)
    assert (felt <= diagonal + added + 1e-9).all()


def test_steps_follow_what_is_felt():
    """What is felt 16 times as much gets a step of a quarter; the damage of all channels is equal."""
    felt = np.array([1.0, 16.0, 4.0, 0.25, 64.0])
    variance = np.array([1.0, 1.0, 9.0, 9.0, 9.0])
    octaves = weights_of(felt, variance, [slice(0, 2), slice(2, 5)])
    assert octaves[0] - octaves[1] == pytest.approx(2)
    damage = felt * 4.0**octaves
    assert np.allclose(damage, damage[0])
    assert octaves.mean() == pytest.approx(3 / 5 * np.log2(3))


def test_uncorrelated_channels_need_no_shaping():
    matrix = np.diag([1.0, 16.0, 256.0])[None]
    shaping, felt = factors(matrix, ProfileRecipe(floor=1e-12, ridge=1e-12))
    assert np.allclose(shaping, np.eye(3))
    assert np.allclose(felt, [[1, 16, 256]])


def shaped_profile(matrix: np.ndarray, geometry: Geometry, with_shaping: bool) -> Profile:
    """Of one head, keys and values alike."""
    shaping, felt = factors(matrix, ProfileRecipe(floor=1e-9, ridge=1e-9))
    dim = matrix.shape[1]
    entries = shaping[0][np.tril_indices(dim, -1)] * with_shaping
    weight = np.rint(-32 * np.log2(felt[0]))
    return hold(
        Profile(
            geometry.model,
            geometry.shape_digest(),
            geometry.tokenizer,
            mean=np.zeros(2 * dim, np.float32),
            deviation=np.full(2 * dim, 64, np.int16),
            weight=np.tile(weight - np.rint(weight.mean()), 2).astype(np.int16),
            shaping=np.tile(entries, 2).astype(np.float16),
        )
    )


def damage(kv: KV, came: KV, matrix: np.ndarray) -> float:
    """Mean of e' F e over tokens, keys and values."""
    errors = [(a - b)[0, 0, 0] for a, b in zip(parts_of(came), parts_of(kv), strict=True)]
    e = torch.cat(errors).double().numpy()
    return float(np.einsum("ti,ij,tj->t", e, matrix[0], e).mean())


def parts_of(kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
    return kv.groups[0].keys, kv.groups[0].values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [-200, -100])
def test_shaping_lowers_the_damage_of_equal_steps(seed, step):
    matrix, dim = fisher(1, 8, seed), 8
    kv = contract.cache(((1, dim, dim),), n_tokens=300, seed=seed)
    shaped, plain = (shaped_profile(matrix, kv.geometry, on) for on in (True, False))
    assert (shaped.weight == plain.weight).all()
    after = [damage(kv, roundtrip(Ecsq(step, profile=one.name), kv), matrix) for one in (shaped, plain)]
    assert after[0] < 0.9 * after[1]
    _, felt = factors(matrix, ProfileRecipe(floor=1e-9, ridge=1e-9))
    steps = 2.0 ** ((step + shaped.weight[:dim]) / 64)
    assert after[0] == pytest.approx((felt[0] * steps**2).sum() / 12, rel=0.2)


@pytest.fixture(scope="module")
def llama():
    return load("llama")


def test_a_fit_is_decided_by_its_seed_and_leaves_the_model_alone(llama):
    before = model_fingerprint(llama.hf, llama.geometry.layers)
    one, again = (fit_profile(llama, Worlds(), TINY) for _ in range(2))
    other = fit_profile(llama, Worlds(), replace(TINY, seed=1))
    assert one.digest == again.digest != other.digest
    assert model_fingerprint(llama.hf, llama.geometry.layers) == before
    assert one.fitted["n_contexts"] == 3
    one.require_sender(llama.geometry)


@pytest.mark.parametrize(
    "wrong", [{"n_contexts": 0}, {"draws": 0}, {"floor": 0.0}, {"ridge": float("nan")}, {"seed": -1}]
)
def test_a_recipe_out_of_range(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_a_profile_saves_bytes_of_short_messages_at_equal_steps():
    """The steps of a message without one, in a profile without shaping: what is saved is the side information.

    With 50 tokens and more nothing is: means and deviations of a message fit it better than those of a model. What a
    profile is good for there is steps that follow what is felt.
    """
    (whole,) = Sender("llama").capture(contexts(1)).sequences()
    kv = whole.take_tokens(torch.arange(8))
    frame = Ecsq(-64).encode(kv)
    weights = read_weights(frame.body(SegmentType.WEIGHTS), kv.geometry.n_layers, "layer")
    blocks = [
        layout.Block(index, which, layer.heads, dim, {})
        for index, layer in enumerate(kv.geometry.layers)
        for which, dim in enumerate((layer.key_dim, layer.value_dim))
    ]
    fitted = find_profile("llama")
    weight = exponents(blocks, weights, "layer").astype(np.int16)
    flat = hold(replace(fitted, weight=weight, shaping=np.zeros_like(fitted.shaping)))
    profiled = Ecsq(-64, profile=flat.name)
    assert len(pack(profiled.encode(kv))) < 0.95 * len(pack(frame))
    errors = [
        sum(float((a.keys - b.keys).square().mean()) for a, b in zip(kv.groups, came.groups, strict=True))
        for came in (roundtrip(profiled, kv), roundtrip(Ecsq(-64), kv))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_the_command(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    words = ["profile", "--out", str(file), "--contexts", "2", "--draws", "1"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    said, profile = json.loads(done.stdout), load_profile(file)
    assert (said["name"], said["n_bytes"]) == (profile.name, file.stat().st_size)
    assert profile.fitted == said["fitted"]
    assert (profile.fitted["n_contexts"], profile.fitted["draws"]) == (2, 1)
    assert find_profile(str(file)).digest == profile.digest
    assert CliRunner().invoke(app, [*words, "--floor", "0"]).exit_code == 2
