"""A model of a known size with random weights: what takes time can be measured without the trained one."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvferry.models.load import Model, load_tokenizer, wrap

QWEN25_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "rope_theta": 1e6,
}


def untrained_qwen(n_positions: int, seed: int = 0) -> Model:
    """The body of Qwen2.5-0.5B, fp32, with the small vocabulary of a zoo member: embeddings take no time."""
    tokenizer = load_tokenizer("qwen3")
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=n_positions, **QWEN25_05B)
    return wrap(Qwen2ForCausalLM(config), tokenizer, name="Qwen2.5-0.5B, random weights")
