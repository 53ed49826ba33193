"""The untrained model: its weights at the start are drawn so that reading back is learned in a minute."""

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import Linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvferry.models.zoo.recipes import Recipe
from kvferry.models.zoo.tokenizers import MAX_POSITIONS, line_end, special_ids

_CONSTANT, _CHANNELS = 0.15, 4
_SHARPNESS, _BIAS = 0.8, 8.0
_PAIR_WEIGHTS = (1.0, 0.7, 0.3)  # the fastest rotary pairs tell near distances apart


def untrained(recipe: Recipe, tokenizer: Tokenizer) -> PreTrainedModel:
    """A model of the recipe's shape; `generate` stops at the end of a line."""
    pad, bos, eos = special_ids(tokenizer)
    ids = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
    config = AutoConfig.for_model(
        recipe.architecture,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=MAX_POSITIONS,
        **ids,
        **recipe.shape,
    )
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [eos, line_end(tokenizer)]
    _look_back(model, recipe.theta, recipe.look_back)
    if recipe.residual_scale != 1.0:
        _soften(model, recipe.residual_scale)
    return model


@torch.no_grad()
def _look_back(model: PreTrainedModel, theta: float, distances: tuple[tuple[int, ...], ...]) -> None:
    """Let heads start out looking some tokens back; from nothing that takes many minutes to emerge.

    Queries and keys get a constant part, and that of a head's queries is turned by its distance, so that the rotary
    score is highest there. It comes from the biases, or, where there are none, from a few constant embedding channels.
    """
    dict(model.named_parameters())["model.embed_tokens.weight"][:, :_CHANNELS] = _CONSTANT
    for number, of_heads in enumerate(distances):
        attention: Any = model.get_submodule(f"model.layers.{number}.self_attn")
        half = attention.head_dim // 2
        angle = theta ** (-torch.arange(half) / half)
        use = torch.zeros(half)
        use[: len(_PAIR_WEIGHTS)] = torch.tensor(_PAIR_WEIGHTS)
        for head, distance in enumerate(of_heads):
            turned = torch.cat([use * (distance * angle).cos(), -use * (distance * angle).sin()])
            _add_constant(attention.q_proj, head, turned)
            _add_constant(attention.k_proj, head // attention.num_key_value_groups, torch.cat([use, 0 * use]))
        if hasattr(attention, "q_norm"):
            attention.q_norm.weight += 2.0


def _add_constant(projection: Linear, head: int, constant: Tensor) -> None:
    rows = slice(head * len(constant), (head + 1) * len(constant))
    if projection.bias is not None:
        projection.bias[rows] = _BIAS * constant
    else:
        projection.weight[rows, :_CHANNELS] = _SHARPNESS * constant[:, None]


@torch.no_grad()
def _soften(model: PreTrainedModel, scale: float) -> None:
    """Let layers add little at the start, so that later ones still see the embeddings.

    Gemma normalises what a layer adds, so there the norm is scaled (its weights are offsets from one).
    """
    for name, weight in model.named_parameters():
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            if model.config.model_type.startswith("gemma"):
                weight.fill_(scale - 1.0)
        elif "o_proj.weight" in name or "down_proj.weight" in name:
            weight *= scale
            weight[:_CHANNELS] = 0.0
