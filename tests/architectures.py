"""Tiny random models, one for every way of caching keys that kvferry carries, and of those that it refuses.

Weights are scaled up fourfold: with the usual initialisation attention is nearly uniform and errors hide in it.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 101
MAX_POSITIONS = 64
"""The dynamic rule applies to longer calls; the longrope one from 33 positions on."""
WINDOW = 8

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def _rope(kind: str = "default", **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **numbers}}


_DYNAMIC = _rope("dynamic", factor=4.0)
_LINEAR = _rope("linear", factor=4.0)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.25, 1.5, 1.75],
    long_factor=[1.0, 2.0, 4.0, 8.0],
    original_max_position_embeddings=32,
)
_PARTIAL = _rope(partial_rotary_factor=0.5)

_CARRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-linear": ("llama", _LINEAR),
    "llama-dynamic": ("llama", _DYNAMIC),
    "llama-yarn": ("llama", _YARN),
    "llama-llama3": ("llama", _LLAMA3),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "decoder_sparse_step": 1, **_EXPERTS}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 2, **_PARTIAL}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", _PARTIAL),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 32, **_LONGROPE}),
    "phi": ("phi", _PARTIAL),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "head_dim": 8}),
    "glm": ("glm", {"head_dim": 8, **_PARTIAL}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": ("granite", {}),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "sliding_window": WINDOW, **_EXPERTS, **_YARN}),
}

_UNCARRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": MAX_POSITIONS}),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "gptj": (
        "gptj",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": MAX_POSITIONS, "rotary_dim": 4},
    ),
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            **_EXPERTS,
            **_LATENT,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 8,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            **_EXPERTS,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            **_EXPERTS,
        },
    ),
    "mamba": ("mamba", {"state_size": 4}),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
}


@cache
def build(name: str) -> PreTrainedModel:
    """The model of that name from `ARCHITECTURES` or `REFUSED`: fp32, eval mode, always the same weights.

    One object per process: leave it as it was found.
    """
    kind, options = {**_CARRIED, **_UNCARRIED}[name]
    # A copy: some configurations write their defaults into the dicts they are given.
    return from_config(AutoConfig.for_model(kind, **copy.deepcopy({**_SHAPE, **options})))


def from_config(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def _builder(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: build(name)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(name) for name in _CARRIED}
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(name) for name in _UNCARRIED}
