"""Watches the keys of a live model at positions of our choice, and leaves the model as it was found.

The probe is one short call with several rows of the same tokens at different positions. Each attention layer is given
the hidden states of the first row in every row, so that its keys differ by the rotation alone: nothing that went before
(rounding at 16 bit, routing of experts) blurs what the layer itself does.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvferry.errors import ModelRefused, UnsupportedLayer

TOKENS = 6


@dataclass(frozen=True)
class Probe:
    """Keys and values of every layer at `positions`; `drift` tells how far positions change the input of layer 0.

    `drift` is relative to the largest hidden state, 0 unless the model adds something positional to its embeddings.
    """

    keys: tuple[Float[Tensor, "batch heads tokens _"], ...]
    values: tuple[Float[Tensor, "batch heads tokens _"], ...]
    positions: Int[Tensor, "axes batch tokens"]
    drift: float

    @property
    def call_length(self) -> int:
        return int(self.positions.max()) + 1


def decoder_of(hf_model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder inside: no language model head, no vision tower."""
    return hf_model.get_decoder()


def attention_layers(decoder: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer number."""
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            found.setdefault(index, module)
    return found


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that hold tables of inverse frequencies."""
    return [module for module in decoder.modules() if table_names(module)]


def table_names(module: nn.Module) -> list[str]:
    """Buffers with inverse frequencies: `inv_freq`, or one per layer type such as `full_attention_inv_freq`."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [
        name for name in names if name.endswith("inv_freq") and "original" not in name and "long" not in name
    ]


def run_probe(hf_model: PreTrainedModel, start: int, offsets: tuple[int, ...], axes: int = 1) -> Probe:
    """One call over `len(offsets)` rows, row `i` beginning at `start + offsets[i]`; later axes move more slowly.

    Raises `UnsupportedLayer` for a layer that leaves no keys in the cache.
    """
    decoder = decoder_of(hf_model)
    embedding: Any = decoder.get_input_embeddings()
    device, vocabulary = embedding.weight.device, int(embedding.weight.shape[0])
    ids = (torch.arange(TOKENS, device=device) + 1) * vocabulary // (TOKENS + 2)
    moves = torch.tensor(
        [[o * (axes - axis) // axes for o in offsets] for axis in range(axes)], device=device
    )
    positions = start + moves.unsqueeze(-1) + torch.arange(TOKENS, device=device)
    cache = DynamicCache()
    with torch.no_grad(), _same_input(attention_layers(decoder)) as drift:
        _call(decoder, ids.expand(len(offsets), -1), positions if axes > 1 else positions[0], cache)
    keys, values = zip(*_cached(cache, decoder), strict=True)
    return Probe(keys, values, positions, drift.relative)


def _call(decoder: PreTrainedModel, ids: Tensor, position_ids: Tensor, cache: DynamicCache) -> None:
    try:
        decoder(input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
    except TypeError as error:
        cure = "Use a decoder that takes position_ids and past_key_values"
        raise ModelRefused(
            f"{type(decoder).__name__} cannot be run at given positions: {error}", cure=cure
        ) from error


def _cached(cache: DynamicCache, decoder: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(int(decoder.config.get_text_config(decoder=True).num_hidden_layers)):
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or layer.keys is None or layer.keys.shape[-2] != TOKENS:
            cure = "Use a model whose every layer caches its own keys"
            raise UnsupportedLayer(f"layer {index} leaves no keys of its own in the cache", cure=cure)
        yield layer.keys, layer.values


@dataclass
class _Drift:
    relative: float = field(default=0.0)


@contextlib.contextmanager
def _same_input(layers: dict[int, nn.Module]) -> Iterator[_Drift]:
    drift = _Drift()
    handles = [
        module.register_forward_pre_hook(_first_row_for_all(drift if index == 0 else None), with_kwargs=True)
        for index, module in layers.items()
    ]
    try:
        yield drift
    finally:
        for handle in handles:
            handle.remove()


def _first_row_for_all(drift: _Drift | None) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if drift is not None:
            drift.relative = float((hidden - hidden[:1]).abs().max() / hidden.abs().max())
        same = hidden[:1].expand_as(hidden).contiguous()
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": same}
        return (same, *args[1:]), kwargs

    return hook


@contextlib.contextmanager
def untouched(hf_model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards the training flags and the state of the rotary modules are as before."""
    training = [module for module in hf_model.modules() if module.training]
    states = [_State(module) for module in rotary_modules(decoder_of(hf_model))]
    hf_model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for state in states:
            state.restore()


class _State:
    """Everything that a rotary module may change in a call: attributes, buffers, and numbers inside buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.buffers = dict(module._buffers)
        self.numbers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for name, numbers in self.numbers.items():
            buffer = self.module.get_buffer(name)
            if not torch.equal(buffer, numbers):
                buffer.data.copy_(numbers)
