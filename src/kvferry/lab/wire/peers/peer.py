"""A peer: something that turns the cache of one message into parts that could travel, and back.

Rule 1: bits count everything that the receiver needs: codes, scales, zeros, means, tables, lengths.
Rule 2: `real` runs the code of others; `like` is written here after their description, and says so.
Rule 3: peers get rotated keys, as they are used; those that need content keys say so in `space`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import KV, Group, KeySpace
from kvferry.lab.wire.coding import Coded, Coding

Label = Literal["ours", "real", "like"]
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `[heads, tokens, dim]`, float32."""


@dataclass(frozen=True)
class Packet:
    """What would travel: its size in bits, and the parts themselves, as `decode` takes them."""

    n_bits: float
    parts: Any


@dataclass(frozen=True)
class Peer:
    """`timed`: whether `encode` really makes bytes, so that its speed means something."""

    codec: str
    spec: str
    label: Label
    encode: Callable[[Layers], Packet]
    decode: Callable[[Any], Layers]
    space: KeySpace = "rotated"
    timed: bool = False

    @property
    def coding(self) -> Coding:
        """The peer over a batch of caches."""
        return lambda subject: through(self, subject.content if self.space == "content" else subject.rotated)


def simulated(
    codec: str, spec: str, quantise: Callable[[Layers], tuple[Layers, float]], *, space: KeySpace = "rotated"
) -> Peer:
    """A peer given as one function: the decoded layers, and the bits by its formula."""

    def encode(layers: Layers) -> Packet:
        decoded, n_bits = quantise(layers)
        return Packet(n_bits, decoded)

    return Peer(codec, spec, "like", encode, lambda decoded: decoded, space)


def each_tensor(
    quantise: Callable[[Tensor], tuple[Tensor, float]],
) -> Callable[[Layers], tuple[Layers, float]]:
    """The same for keys and values of every layer."""

    def run(layers: Layers) -> tuple[Layers, float]:
        done = [(quantise(keys), quantise(values)) for keys, values in layers]
        return [(k[0], v[0]) for k, v in done], sum(k[1] + v[1] for k, v in done)

    return run


@torch.no_grad()
def through(peer: Peer, caches: KV) -> Coded:
    """Every message alone through a peer."""
    packets = [peer.encode(layers_of(caches, row)) for row in range(caches.n_batch)]
    return Coded(
        kv_of([peer.decode(packet.parts) for packet in packets], caches),
        float(sum(packet.n_bits for packet in packets)),
    )


def layers_of(caches: KV, row: int) -> Layers:
    """The cache of one message as plain tensors."""
    both = (caches.layer(index) for index in range(caches.geometry.n_layers))
    return [(keys[row].float(), values[row].float()) for keys, values in both]


def kv_of(rows: list[Layers], like: KV) -> KV:
    """The inverse for a batch; everything else is as in `like`."""
    groups = (
        Group(group.layers, _stack(rows, group.layers, 0), _stack(rows, group.layers, 1))
        for group in like.groups
    )
    return like.with_groups(tuple(groups))


def _stack(
    rows: list[Layers], layers: tuple[int, ...], which: int
) -> Float[Tensor, "layers batch heads tokens dim"]:
    return torch.stack([torch.stack([row[layer][which].float() for row in rows]) for layer in layers])
