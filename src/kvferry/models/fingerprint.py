"""Fingerprints: 64 hex digits that agree if and only if caches of one model can be read as caches of the other.

They are computed once per load. Weights are sampled, not read whole: a fine-tune, a merged or attached LoRA and a
quantisation change every sample, so 4 KiB per parameter tell them apart in a fraction of a second.
"""

import hashlib
import json
from dataclasses import asdict
from operator import itemgetter

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvferry.errors import ModelRefused
from kvferry.kv import LayerGeometry

BLOCKS, BLOCK = 16, 128
"""A sample: 16 runs of 128 numbers, spread evenly from the first to the last; at bf16 that is 4 KiB."""


def model_fingerprint(hf_model: PreTrainedModel, geometry_rows: tuple[LayerGeometry, ...]) -> str:
    """SHA-256 over model type, dims and rotation of every layer, and a sample of every parameter, rounded to bf16.

    Loads of one checkpoint as fp32 and bf16 agree; fp16 does not (it rounds differently), nor do other weights.
    Raises `ModelRefused` for parameters that are not in memory.
    """
    # The type as well: equal weights mean something else under another architecture's multipliers.
    kind = hf_model.config.get_text_config(decoder=True).model_type
    digest = hashlib.sha256(_canonical([kind, [asdict(row) for row in geometry_rows]]))
    for name, parameter in sorted(_own_parameters(hf_model), key=itemgetter(0)):
        digest.update(_canonical([name, list(parameter.shape), *_kind(parameter)]))
        digest.update(_sample(parameter).cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the fast tokenizer's own JSON and its special tokens; padding and truncation do not count.

    Raises `ModelRefused` for slow tokenizers: they cannot say which bytes a token stands for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        cure = "Load it with AutoTokenizer from a folder that has a tokenizer.json"
        raise ModelRefused(f"{type(tokenizer).__name__} gives no offsets", cure=cure)
    content = json.loads(backend.to_str())
    # Both are set by the last call that padded or truncated.
    content.pop("padding", None)
    content.pop("truncation", None)
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    return hashlib.sha256(_canonical([content, roles])).hexdigest()


def _own_parameters(hf_model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Each parameter once. An output embedding that equals the input one is left out, tied or stored twice."""
    found = list(hf_model.named_parameters())
    for name, parameter in found:
        if parameter.is_meta:
            cure = "Load the model without offloading to disk"
            raise ModelRefused(f"parameter {name} is not in memory", cure=cure)
    entrance = getattr(hf_model.get_input_embeddings(), "weight", None)
    exit_ = getattr(hf_model.get_output_embeddings(), "weight", None)
    if entrance is exit_ or entrance is None or exit_ is None or not _equal(entrance, exit_):
        return found
    return [(name, parameter) for name, parameter in found if parameter is not exit_]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _kind(parameter: Tensor) -> list[str]:
    """Nothing for floating point, where the precision loaded in does not count; else the storage type."""
    return [] if parameter.is_floating_point() and parameter.element_size() >= 2 else [str(parameter.dtype)]


def _sample(parameter: Tensor) -> UInt8[Tensor, " bytes"]:
    flat = parameter.detach().flatten()
    taken = flat[_offsets(flat.numel()).to(flat.device)]
    rounded = taken.to(torch.bfloat16) if not _kind(parameter) else taken
    return rounded.contiguous().view(torch.uint8)


def _offsets(size: int) -> Int[Tensor, " sample"]:
    if size <= BLOCKS * BLOCK:
        return torch.arange(size)
    # Runs, not single numbers: at an even stride the numbers could all lie in one column.
    starts = torch.arange(BLOCKS) * (size - BLOCK) // (BLOCKS - 1)
    return (starts.unsqueeze(-1) + torch.arange(BLOCK)).flatten()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
