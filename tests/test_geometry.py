"""What is read from live models, and what is refused."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from architectures import _SHAPE, ARCHITECTURES, REFUSED, VOCABULARY, WINDOW, build, from_config
from kvferry.errors import UnsupportedLayer
from kvferry.models.geometry import read_geometry

REASONS = {
    "gpt2": "layer 0 has learned or absolute positions",
    "opt": "layer 0 has learned or absolute positions",
    "gptj": "layer 0 has GPTJAttention, which is not on transformers' AttentionInterface",
    "bloom": "layer 0 has ALiBi",
    "mpt": "layer 0 has ALiBi",
    "falcon-alibi": "layer 0 has ALiBi",
    "deepseek_v3": r"layer 0 has latent attention \(MLA\)",
    "qwen3_next": "layer 0 has .*recurrent or convolutional state",
    "lfm2": "layer 0 has .*recurrent or convolutional state",
    "jamba": "layer 0 has .*recurrent or convolutional state",
    "mamba": "layer 0 has .*recurrent or convolutional state",
    "gemma3n": "layer 2 has shared keys and values",
}
_LLAMA4 = {"head_dim": 8, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, "num_local_experts": 2}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_layer_and_kind(name: str) -> None:
    with pytest.raises(UnsupportedLayer, match=REASONS[name]):
        read_geometry(build(name), "")


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2)
    with pytest.raises(UnsupportedLayer, match="layer 0 has encoder-decoder attention"):
        read_geometry(from_config(config, AutoModelForSeq2SeqLM), "")


def test_positions_added_beside_the_rotation_are_refused() -> None:
    model = copy.deepcopy(build("llama"))

    def add_positions(_, args, kwargs):
        return (args[0] + 0.01 * kwargs["position_ids"].unsqueeze(-1), *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(add_positions, with_kwargs=True)
    with pytest.raises(UnsupportedLayer, match="layer 0 has positions added to its input"):
        read_geometry(model, "")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dims_are_those_of_the_config(name: str) -> None:
    model = build(name)
    geometry, config = read_geometry(model, "abc"), model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert {(layer.heads, layer.key_dim, layer.value_dim) for layer in geometry.layers} == {(heads, dim, dim)}
    assert geometry.n_layers == config.num_hidden_layers
    assert (geometry.tokenizer, geometry.max_positions) == ("abc", config.max_position_embeddings)


@pytest.mark.parametrize(
    "name", ["qwen2-sliding", "mistral-sliding", "gemma2", "gemma3", "gpt_oss", "cohere2"]
)
def test_windows_are_those_that_attention_has(name: str) -> None:
    model = copy.deepcopy(build(name))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(input_ids=torch.arange(20)[None], output_attentions=True).attentions
    widths = [int((weights[0, 0, -1, :20] > 0).sum()) for weights in seen]
    assert widths == [layer.window or 20 for layer in read_geometry(model, "").layers]
    assert WINDOW in widths
    assert not any(layer.chunked for layer in read_geometry(model, "").layers)


def test_chunked_windows_are_told_apart() -> None:
    model = from_config(AutoConfig.for_model("llama4_text", **_SHAPE, **_LLAMA4), AutoModel)
    layers = read_geometry(model, "").layers
    assert [(layer.window, layer.chunked) for layer in layers] == [(WINDOW, True)] * 3 + [(None, False)]
