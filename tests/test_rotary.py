"""Rotations read from live models: keys carried elsewhere equal keys computed there, in every layer."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from architectures import _SHAPE, ARCHITECTURES, MAX_POSITIONS, VOCABULARY, build, from_config
from kvferry.errors import ModelRefused, RotaryMismatch
from kvferry.models.rotary import read_rotary, reset_call_state
from kvferry.rope import RotarySpec, rotate, strip

TOKENS = 12
LIMIT = 1e-5
DEPENDS_ON_CALL = ("llama-dynamic", "phi3-longrope")
AXES = {
    "qwen2_vl_text": ((1, 2, 1), "blocks", "half"),
    "qwen3_vl_text": ((2, 1, 1), "turns", "half"),
    "glm4v_text": ((1, 2, 1), "blocks", "interleaved"),
}


def keys_at(model: PreTrainedModel, positions: torch.Tensor) -> list[torch.Tensor]:
    """Keys of every layer, one row per row of `positions` [axes, batch, tokens], of the same tokens."""
    reset_call_state(model)
    ids = (torch.arange(positions.shape[2]) * 7 + 3) % VOCABULARY
    where = positions if len(positions) > 1 else positions[0]
    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=ids.expand(positions.shape[1], -1),
            position_ids=where,
            past_key_values=cache,
            use_cache=True,
        )
    reset_call_state(model)
    return [layer.keys for layer in cache.layers]


def two_rows(start: int, offset: int) -> torch.Tensor:
    return torch.tensor([[[start], [start + offset]]]) + torch.arange(TOKENS)


def miss(keys: torch.Tensor, positions: torch.Tensor, spec: RotarySpec) -> float:
    """Row 0 carried to the positions of row 1, against row 1; largest error over the largest key."""
    length = int(positions.max()) + 1
    content = strip(keys[:1], positions[:, :1], spec, length)
    carried = rotate(content, positions[:, 1:], spec, length)
    return float((carried - keys[1:]).abs().max() / keys.abs().max())


@pytest.mark.parametrize(("start", "offset"), [(0, 13), (0, 37), (200, 37), (100_000, 37)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_carried_keys_equal_recomputed_keys(name: str, start: int, offset: int) -> None:
    model, positions = build(name), two_rows(start, offset)
    # An angle near 1e5 has no more than 2^-7 of a radian in fp32; layers after the first inherit that as noise.
    layers = slice(1) if start == 100_000 else slice(None)
    specs = read_rotary(model)
    errors = [
        miss(keys, positions, spec) for keys, spec in zip(keys_at(model, positions), specs, strict=True)
    ]
    assert max(errors[layers]) <= LIMIT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrong_rotations_miss(name: str) -> None:
    model, positions = build(name), two_rows(0, 37)
    keys, spec = keys_at(model, positions)[0], read_rotary(model)[0]
    wrong = [
        replace(spec, style="half" if spec.style == "interleaved" else "interleaved"),
        replace(spec, inv_freq=tuple(frequency * 1.01 for frequency in spec.inv_freq), long=None),
        replace(spec, style="none"),
    ]
    assert min(miss(keys, positions, candidate) for candidate in wrong) > 100 * LIMIT
    off_by_one = positions + torch.tensor([[[0], [1]]])
    assert miss(keys, off_by_one, spec) > 100 * LIMIT


@pytest.mark.parametrize("name", DEPENDS_ON_CALL)
def test_keys_cross_into_a_long_call(name: str) -> None:
    """Layer 0 only: what later layers compute from other frequencies is rightly something else."""
    model = build(name)
    short, long = torch.arange(TOKENS).reshape(1, 1, -1), torch.arange(300, 300 + TOKENS).reshape(1, 1, -1)
    spec = read_rotary(model)[0]
    before, after = keys_at(model, short)[0], keys_at(model, long)[0]
    content = strip(before, short, spec, TOKENS)
    scale = after.abs().max()
    assert (rotate(content, long, spec, 300 + TOKENS) - after).abs().max() <= LIMIT * scale
    assert (rotate(content, long, spec, TOKENS) - after).abs().max() > 100 * LIMIT * scale


@pytest.mark.parametrize("name", ["llama-yarn", "gpt_oss", "llama-dynamic"])
def test_content_keys_are_what_the_projection_gave(name: str) -> None:
    """The scaling inside cosine and sine cancels when keys are carried, so it needs a test of its own."""
    model, seen = build(name), []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    positions = torch.arange(TOKENS).reshape(1, 1, -1)
    keys = keys_at(model, positions)[0]
    handle.remove()
    content = strip(keys, positions, read_rotary(model)[0], TOKENS)
    made = seen[0].unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
    torch.testing.assert_close(content, made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm3", ["half", "none", "half", "none"]),
        ("cohere2", ["interleaved"] * 3 + ["none"]),
        ("glm", ["interleaved"] * 4),
        ("llama", ["half"] * 4),
    ],
)
def test_styles(name: str, expected: list[str]) -> None:
    assert [spec.style for spec in read_rotary(build(name))] == expected


def test_tables_by_layer_type() -> None:
    local, _, global_, _ = read_rotary(build("gemma3"))
    assert local.inv_freq[0] == 1.0
    assert global_.inv_freq[0] == 1.0 / 8.0


def test_backward_rotation_has_negative_frequencies() -> None:
    model = from_config(AutoConfig.for_model("nanochat", **_SHAPE))
    assert all(spec.inv_freq[0] == -1.0 for spec in read_rotary(model))


@pytest.mark.parametrize("kind", AXES)
def test_several_position_axes(kind: str) -> None:
    sections, order, style = AXES[kind]
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": list(sections),
        "partial_rotary_factor": 1.0,
    }
    model = from_config(AutoConfig.for_model(kind, **_SHAPE, head_dim=8, rope_parameters=rope), AutoModel)
    spec = read_rotary(model)[0]
    assert (spec.sections, spec.section_order, spec.style) == (sections, order, style)
    walk = torch.randint(0, 5, (3, 1, TOKENS)).cumsum(-1)
    positions = torch.cat((walk, walk + torch.tensor([37, 5, 11]).reshape(3, 1, 1)), 1)
    assert max(miss(keys, positions, spec) for keys in keys_at(model, positions)) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_16_bit_loads_have_the_same_rotation(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(build(name))
    for parameter in model.parameters():  # as from_pretrained(dtype=...) does: tables stay fp32
        parameter.data = parameter.data.to(dtype)
    assert read_rotary(model) == read_rotary(build(name))


def test_casting_a_loaded_model_rounds_its_tables() -> None:
    """A trap of transformers: `.to(bfloat16)` after loading changes the model's frequencies. We read what it does."""
    cast = read_rotary(copy.deepcopy(build("llama")).to(torch.bfloat16))[0]
    assert cast.inv_freq != read_rotary(build("llama"))[0].inv_freq


def test_loading_at_16_bit_keeps_the_tables(tmp_path: Path) -> None:
    build("phi3-longrope").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert read_rotary(loaded) == read_rotary(build("phi3-longrope"))


def _state(model: PreTrainedModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in module.__dict__.items() if not key.startswith("_")}
        found |= {f"{name}.{key}": (id(b), b.clone()) for key, b in module._buffers.items() if b is not None}
        found[f"{name} hooks"] = len(module._forward_pre_hooks)
    return found


@pytest.mark.parametrize("longest", [0, 300])
@pytest.mark.parametrize("name", [*DEPENDS_ON_CALL, "gemma3"])
def test_the_probe_leaves_no_trace(name: str, longest: int) -> None:
    model = copy.deepcopy(build(name)).train()
    model.model.layers[1].eval()
    if longest:
        model(input_ids=torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, longest]]))
    before, generator = _state(model), torch.get_rng_state()
    read_rotary(model)
    after = _state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.Tensor):
            assert value[0] == after[name][0], name
            assert torch.equal(value[1], after[name][1]), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name
    assert torch.equal(generator, torch.get_rng_state())


def test_a_reset_forgets_earlier_calls() -> None:
    model = copy.deepcopy(build("llama-dynamic"))
    ids = torch.arange(2 * MAX_POSITIONS) % VOCABULARY

    def call(length: int) -> torch.Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids[None, :length], past_key_values=cache, use_cache=True)
        return cache.layers[0].keys

    short, long = MAX_POSITIONS - 16, MAX_POSITIONS + 16
    fresh = {length: call(length) for length in (short, long)}
    call(2 * MAX_POSITIONS)
    # Which calls remember the longer one before them depends on the release of transformers.
    assert not all(
        torch.equal(call(length), keys) for length, keys in [(long, fresh[long]), (short, fresh[short])]
    )
    for length, keys in fresh.items():
        call(2 * MAX_POSITIONS)
        reset_call_state(model)
        assert torch.equal(call(length), keys)


def test_a_rotation_that_no_table_explains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def shuffled(query: Any, key: Any, cos: Any, sin: Any, **options: Any) -> Any:
        return original(query, key, cos.roll(1, -1), sin, **options)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", shuffled)
    with pytest.raises(RotaryMismatch, match=r"layer 0 \(LlamaAttention\).*misses its keys by"):
        read_rotary(build("llama"))


@pytest.mark.parametrize(
    "spoilt", ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(spoilt: str, number: float) -> None:
    model = copy.deepcopy(build("llama"))
    model.get_parameter(spoilt).data[0, 0] = number
    with pytest.raises(
        ModelRefused, match=f"weights {spoilt} hold numbers that are NaN or infinite"
    ) as caught:
        read_rotary(model)
    assert not isinstance(caught.value, RotaryMismatch)


def test_keys_that_overflow_are_not_blamed_on_the_rotation() -> None:
    model = copy.deepcopy(build("llama"))
    model.get_parameter("model.layers.1.self_attn.k_proj.weight").data.fill_(3e38)
    with pytest.raises(ModelRefused, match="the keys of layer 1 are NaN or infinite"):
        read_rotary(model)
