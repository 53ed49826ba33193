"""The wire as a training step: what arrives going forward, the identity going back.

The straight-through estimator (arXiv:1308.3432) of exactly what a codec does, whatever it rounds with: for parameters
that stand before the wire, an encoder's say. Behind it no estimator is needed: gradients end at what was decoded.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from kvferry.codec.base import Codec, roundtrip
from kvferry.kv import KV, Group


def straight_through(codec: Codec, kv: KV) -> KV:
    """The numbers of `roundtrip`, to the bit, with the gradient of `kv`; none in absent slots."""
    arrived = roundtrip(codec, kv)
    pairs = zip(kv.groups, arrived.groups, strict=True)
    return arrived.with_groups(tuple(_group(kv, own, came) for own, came in pairs))


def _group(kv: KV, own: Group, came: Group) -> Group:
    held = kv.present[list(own.layers)][:, :, None, :, None]
    return Group(own.layers, _straight(own.keys, came.keys, held), _straight(own.values, came.values, held))


def _straight(own: Tensor, came: Tensor, held: Bool[Tensor, "layers batch 1 tokens 1"]) -> Tensor:
    # Zero, and its gradient one: adding it leaves the numbers that came as they are.
    passing = torch.where(held, own.float(), 0.0)
    return came.detach() + (passing - passing.detach())
