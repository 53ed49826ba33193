"""One forward pass whose attention kvferry controls: its masks, and what is recorded of it.

Rule 1: masks are built here from positions and from which slot is held by which layer, never from cache indices:
transformers counts slots, so its sliding masks are wrong as soon as a slot is missing.
Rule 2: the arithmetic stays the model's own. The function registered below builds the mask, then calls the
attention function of the model's module (soft caps and sinks included).
Rule 3: outside `controlled()` the model is exactly as it was found.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvferry.kv import Geometry, LayerGeometry

IMPLEMENTATION = "kvferry"

Watch = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]
"""Called with layer, rotated queries, rotated keys, values and, where computed, attention weights."""


@dataclass
class Pass:
    """What the attention layers must know about the forward pass that is running."""

    geometry: Geometry
    query_positions: Int[Tensor, "batch new"]
    key_positions: Int[Tensor, "batch slots"]
    valid: Bool[Tensor, "layers batch slots"]
    same_everywhere: bool
    inner: str
    watch: Watch | None = None
    masks: dict[tuple[int | None, bool, int], Tensor] = field(default_factory=dict)

    def mask(self, layer: int, dtype: torch.dtype) -> Float[Tensor, "batch 1 new slots"]:
        """The additive mask of a layer, built once for all layers that look alike."""
        spec = self.geometry.layers[layer]
        key = (spec.window, spec.chunked, 0 if self.same_everywhere else layer)
        if key not in self.masks:
            self.masks[key] = _additive(self._visible(layer, spec), dtype)
        return self.masks[key]

    def _visible(self, layer: int, spec: LayerGeometry) -> Bool[Tensor, "batch new slots"]:
        query, key = self.query_positions.unsqueeze(-1), self.key_positions.unsqueeze(-2)
        seen = (key <= query) & self.valid[layer].unsqueeze(-2)
        if spec.window is None:
            return seen
        if spec.chunked:
            return seen & (key // spec.window == query // spec.window)
        return seen & (query - key < spec.window)


def _additive(
    visible: Bool[Tensor, "batch new slots"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 new slots"]:
    # The lowest finite number, not -inf: a padding query sees nothing, and must not become NaN.
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min).unsqueeze(1)


_running: ContextVar[Pass | None] = ContextVar("kvferry_pass", default=None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention signature; `attention_mask` is None because no mask is made (see `_no_mask`)."""
    current = _running.get()
    if current is None:
        raise RuntimeError("the kvferry attention function runs only inside controlled()")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    code = sys.modules[type(module).__module__]
    attend = code.ALL_ATTENTION_FUNCTIONS.get_interface(current.inner, code.eager_attention_forward)
    output, weights = attend(module, query, key, value, current.mask(layer, query.dtype), **options)
    if current.watch is not None:
        current.watch(layer, query, key, value, weights)
    return output, weights


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


@contextlib.contextmanager
def controlled(hf: PreTrainedModel, current: Pass) -> Iterator[None]:
    """Route the attention of `hf` through kvferry for the forward passes inside."""
    config = hf.config.get_text_config(decoder=True)
    found = config._attn_implementation
    config._attn_implementation_internal = IMPLEMENTATION
    token = _running.set(current)
    try:
        yield
    finally:
        _running.reset(token)
        config._attn_implementation_internal = found


def inner_implementation(hf: PreTrainedModel, *, weights: bool = False) -> str:
    """The attention function to delegate to: the model's own, unless it cannot take a mask or give weights."""
    found = hf.config.get_text_config(decoder=True)._attn_implementation
    if weights or found == "eager":
        return "eager"
    return "sdpa"


def call_filler(
    geometry: Geometry, positions: Int[Tensor, "batch tokens"], call_length: int
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"], Int[Tensor, "batch n"]]:
    """Id, mask and position of one masked token at the end of a longer call, or of none.

    Rotary rules that look at the length of a call (longrope, dynamic) look at its largest position. With this token
    at the prompt's last position, a part of the prompt is read exactly as if the whole came in one call.
    """
    n = 0
    if any(layer.rotary.long for layer in geometry.layers):
        n = int(int(positions.max()) + 1 < call_length)
    ids = torch.zeros(positions.shape[0], n, dtype=torch.long, device=positions.device)
    return ids, ids.bool(), torch.full_like(ids, call_length - 1)
