"""transformers' quantised caches with their defaults, in bfloat16: what they hold in memory would have to travel."""

from functools import partial
from typing import Any

from kvferry.lab.wire.peers.peer import Layers, Packet, Peer
from kvferry.models.quantised import Backend, dequantised, fill, quantised_bytes, quantised_layer


def quanto_peers() -> list[Peer]:
    """Raises `UsageError` without optimum-quanto."""
    return [_peer("quanto", bits) for bits in (2, 4)]


def hqq_peers() -> list[Peer]:
    """Raises `UsageError` without hqq."""
    return [_peer("hqq", bits) for bits in (4, 8)]


def _peer(backend: Backend, bits: int) -> Peer:
    quantised_layer(backend, bits)  # refuse now what would fail later
    return Peer(
        f"transformers-{backend}",
        f"bits={bits}",
        "real",
        partial(_encode, backend=backend, bits=bits),
        _decode,
        timed=True,
    )


def _encode(layers: Layers, backend: Backend, bits: int) -> Packet:
    held = []
    for keys, values in layers:
        layer = quantised_layer(backend, bits)
        fill(layer, keys.bfloat16().unsqueeze(0), values.bfloat16().unsqueeze(0))
        held.append(layer)
    return Packet(8.0 * sum(map(quantised_bytes, held)), held)


def _decode(held: list[Any]) -> Layers:
    pairs = map(dequantised, held)
    return [(keys[0].float(), values[0].float()) for keys, values in pairs]
