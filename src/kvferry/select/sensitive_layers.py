"""Layers by what attention loses without them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.errors import BadSpec
from kvferry.kv import Need
from kvferry.metrics.attention import attention_outputs, relative_error
from kvferry.select.layer_contract import LayersByImportance
from kvferry.select.probe import context, probe
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class SensitiveLayers(LayersByImportance):
    """Keeps the layers whose loss does the most harm.

    `sensitivity` holds one number for each layer, measured beforehand, on answers say. Without it, it is measured on
    the sequence in the hand: the relative error of what the last `window` queries read once the context before them
    is gone from the layer.

    >>> SensitiveLayers(sensitivity=(0.2, 0.9, 0.4), share=0.3).brief()
    'sensitive_layers(sensitivity=(0.2, 0.9, 0.4), share=0.3)'
    """

    name: ClassVar[str] = "sensitive_layers"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    sensitivity: tuple[float, ...] = ()
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise BadSpec(f"sensitive_layers(window={self.window})", cure="window is 1 or more")

    def importance(self, sight: Sight) -> Float[Tensor, " layers"]:
        n_layers = sight.kv.geometry.n_layers
        if not self.sensitivity:
            return torch.stack([harm(sight, layer, self.window) for layer in range(n_layers)])
        if len(self.sensitivity) != n_layers:
            what = f"a sensitivity of {len(self.sensitivity)} layers for a model of {n_layers}"
            raise BadSpec(what, cure=f"Give {n_layers} numbers, or none to measure them")
        return torch.tensor(self.sensitivity, device=sight.kv.device)


def harm(sight: Sight, layer: int, window: int) -> Float[Tensor, ""]:
    """Relative error of what the last queries read without the context before them, mean over heads."""
    posed, values = probe(sight, layer, window), sight.read.layer(layer)[1]
    left = posed.visible & ~context(sight, posed)
    whole, without = (
        attention_outputs(posed.queries, posed.keys, values, visible, posed.scores)
        for visible in (posed.visible, left)
    )
    every = torch.ones_like(posed.visible[..., 0])
    return relative_error(without, whole, every).mean()
