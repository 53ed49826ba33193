"""Reads from a live model what a cache of it must look like, and refuses layers that have no such cache.

Structure is looked at first, because it gives refusals a name; the probe (`models/probe.py`) then shows what is left.
"""

import sys
from collections.abc import Iterator
from typing import NoReturn

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvferry.errors import UnsupportedLayer
from kvferry.kv import Geometry, LayerGeometry
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.probe import Probe, attention_layers, decoder_of, rotary_modules
from kvferry.models.rotary import read_layers

CURE = "Use a decoder-only model with rotary positions and a key/value cache in every layer"
MORE = "it holds more than keys and values"
SHARED = "it reads the cache of another layer"
MIXED_IN = "they are mixed into the hidden states and cannot be taken out"

_DRIFT = 1e-3


def read_geometry(hf_model: PreTrainedModel, tokenizer_fingerprint: str) -> Geometry:
    """Dims, window and rotation of every layer, and the model's fingerprint.

    Heads and dims are those of keys that the model made, rotations are verified (`read_rotary`). Raises
    `UnsupportedLayer` or `RotaryMismatch`, naming the layer.
    """
    _refuse_by_structure(hf_model)
    rotary, seen = read_layers(hf_model)
    _refuse_added_positions(seen)
    windows = _windows(hf_model)
    layers = tuple(
        LayerGeometry(keys.shape[1], keys.shape[3], values.shape[3], spec, window, chunked)
        for keys, values, spec, (window, chunked) in zip(seen.keys, seen.values, rotary, windows, strict=True)
    )
    longest = getattr(hf_model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Geometry(layers, model_fingerprint(hf_model, layers), tokenizer_fingerprint, longest)


def _windows(hf_model: PreTrainedModel) -> Iterator[tuple[int | None, bool]]:
    """Window of every layer as transformers caches it, and whether its borders are fixed."""
    config = hf_model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    # Without types transformers takes the sliding window where there is one, and else the chunk size.
    unnamed = "" if getattr(config, "sliding_window", None) else "chunked_attention"
    for layer, kind in zip(layers, types, strict=True):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        yield window, window is not None and (kind or unnamed) == "chunked_attention"


def _refuse_by_structure(hf_model: PreTrainedModel) -> None:
    if hf_model.config.is_encoder_decoder:
        _refuse(0, "encoder-decoder attention", "what the encoder read is in no decoder cache")
    decoder = decoder_of(hf_model)
    attention = attention_layers(decoder)
    for index, cached in enumerate(_cache_kinds(hf_model)):
        _refuse_uncached(index, cached)
        if index not in attention:
            _refuse(
                index, "no numbered attention, perhaps recurrent or convolutional state", "it keeps no keys"
            )
        _refuse_attention(index, attention[index], decoder)
    if (held := len(_cache_kinds(hf_model))) < decoder.config.get_text_config(decoder=True).num_hidden_layers:
        _refuse(held, "shared keys and values", SHARED)
    if not rotary_modules(decoder):
        _refuse(0, "learned or absolute positions", MIXED_IN)


def _cache_kinds(hf_model: PreTrainedModel) -> list[type]:
    config = hf_model.config.get_text_config(decoder=True)
    try:
        return [type(layer) for layer in DynamicCache(config=config).layers]
    except KeyError as error:  # a layer type that transformers itself caches in a class of the model's own
        kind = error.args[0]
        _refuse(list(config.layer_types).index(kind), f"a cache of kind {kind}", MORE)


def _refuse_uncached(index: int, cached: type) -> None:
    if cached in (DynamicLayer, DynamicSlidingWindowLayer):
        return
    if cached.__name__ == "DummyLayer":
        _refuse(index, "shared keys and values", SHARED)
    if "Linear" in cached.__name__:
        _refuse(
            index,
            "recurrent or convolutional state",
            "the state sums up all tokens and belongs to none of them",
        )
    _refuse(index, f"a cache of kind {cached.__name__}", MORE)


def _refuse_attention(index: int, module: nn.Module, decoder: nn.Module) -> None:
    if getattr(module, "kv_lora_rank", None) is not None:
        _refuse(index, "latent attention (MLA)", "its cache holds latents, not keys and values of heads")
    if getattr(module, "is_kv_shared_layer", False):
        _refuse(index, "shared keys and values", SHARED)
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        _refuse(index, "cross-attention", "its keys belong to another input")
    if _uses_alibi(decoder):
        _refuse(index, "ALiBi positions", "distance is added to the scores, which needs the original slots")
    if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        kind = f"{type(module).__name__}, which is not on transformers' AttentionInterface"
        _refuse(index, kind, "its masks cannot be set")


def _uses_alibi(decoder: nn.Module) -> bool:
    if (used := getattr(decoder, "use_alibi", None)) is not None:
        return bool(used)
    return any("build" in name and "alibi" in name for name in dir(type(decoder)))


def _refuse_added_positions(seen: Probe) -> None:
    if seen.drift > _DRIFT:
        _refuse(0, "positions added to its input", MIXED_IN)


def _refuse(layer: int, kind: str, lost: str) -> NoReturn:
    raise UnsupportedLayer(f"layer {layer} has {kind}: {lost}", cure=CURE)
