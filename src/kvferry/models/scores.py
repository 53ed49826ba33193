"""How each layer of a live model scales and caps q·k before its softmax, heard from the call that it makes itself.

Attributes of modules would not do: a module may hold a soft cap that it never hands on to its attention function.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvferry.metrics.attention import Scores
from kvferry.models.load import Model
from kvferry.models.tap import Pass, controlled

_LISTENER = "kvferry_scores"
_heard: ContextVar[dict[int, Scores]] = ContextVar("kvferry_scores")


@torch.no_grad()
def scores_of(model: Model) -> tuple[Scores, ...]:
    """Scale, soft cap and sinks, layer by layer, from one forward pass over one token."""
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    valid = torch.ones(model.geometry.n_layers, 1, 1, dtype=torch.bool, device=model.device)
    heard: dict[int, Scores] = {}
    token = _heard.set(heard)
    try:
        with model.exclusive, controlled(model.hf, Pass(model.geometry, one, one, valid, True, _LISTENER)):
            model.hf.get_decoder()(input_ids=one, position_ids=one, use_cache=False)
    finally:
        _heard.reset(token)
    return tuple(heard[layer] for layer in range(model.geometry.n_layers))


def _listen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' attention signature. With one slot to attend to, what is read is its value."""
    scale, sinks = options.get("scaling"), options.get("s_aux")
    _heard.get()[int(module.layer_idx)] = Scores(  # type: ignore[arg-type]
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        soft_cap=options.get("softcap"),
        sinks=None if sinks is None else sinks.detach(),
    )
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register(_LISTENER, _listen)
