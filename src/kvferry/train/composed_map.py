"""Maps with activations, taken apart one by one."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from kvferry.align.contract import Aligner
from kvferry.align.kv_projector_mlp import KVCacheProjectorMLP
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.stacked import StackedLinear
from kvferry.metrics.lipschitz import SLOPES, module_norm, spectral_norm
from kvferry.train.token_map import Path, TokenMap, everywhere


def _residual_mlp(aligner: Aligner) -> TokenMap:
    """The affine path, of each class where there are classes, beside the perceptron."""
    plain = cast(ResidualMLP, aligner).fold()
    bent = everywhere(plain.down.weight, module_norm(nn.Sequential(plain.up, nn.GELU())))
    straight = [plain.inner + apart for apart in plain.class_inner] if plain.classes else [plain.inner]
    return TokenMap(plain.neighbours, tuple((everywhere(weight.T), bent) for weight in straight))


def _kv_projector_mlp(aligner: Aligner) -> TokenMap:
    """A perceptron for each part, between the sender's scale and the receiver's."""
    plain = cast(KVCacheProjectorMLP, aligner)
    paths = []
    for parts, mlp in zip(plain.parts, plain.mlp, strict=True):
        up, down = (cast(StackedLinear, layer) for layer in list(mlp.children())[:3:2])
        for columns, places, first, last in zip(
            parts.columns, parts.places, up.weight, down.weight, strict=True
        ):
            inward = torch.zeros(len(plain.x_std), first.shape[-1]).to(first)
            inward.index_add_(0, columns.to(first.device), first / plain.x_std[columns].unsqueeze(-1))
            outward = last.T * plain.y_std[places].unsqueeze(-1)
            paths.append(Path(places.to(last.device), outward, SLOPES[nn.GELU] * spectral_norm(inward)))
    return TokenMap(plain.neighbours, (tuple(paths),))


COMPOSED: dict[str, Callable[[Aligner], TokenMap]] = {
    "kv_projector_mlp": _kv_projector_mlp,
    "residual_mlp": _residual_mlp,
}
"""By the name of the aligner."""
