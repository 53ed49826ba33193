"""How fast codecs are, end to end, on one thread: a cache to the bytes of a message, and bytes to a cache.

Rule 1: numbers are fresh in every repeat, at least a million of them: repeated ones flatter a processor that remembers.
Rule 2: GB/s count the cache in bfloat16 on both ways, and stand beside a memcpy of 64 MB measured right before.
Rule 3: the first repeat compiles and allocates; it does not count.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.codec import CODECS, decode
from kvferry.kv import KV, Geometry, Group, LayerGeometry, Role
from kvferry.lab.wire.coding import message_of
from kvferry.lab.wire.memory import peak_memory
from kvferry.lab.wire.peers.peer import Label, Peer, layers_of
from kvferry.models.tokens import plain_spans
from kvferry.rope import NO_ROTATION
from kvferry.wire import unpack

N_TOKENS = 128
N_NUMBERS = 1_000_000
_COPIED = 64 * 2**20

GEOMETRIES = {"Qwen2.5-0.5B": (24, 2, 64), "Qwen2.5-7B": (28, 4, 128)}
"""Layers, key heads, channels of a head."""

SPECS = (
    "raw(dtype=bfloat16)",
    "int(bits=8, group=64, axis=block)",
    "int(bits=4, group=64, axis=block)",
    "int(bits=4, group=64, axis=block, centred=True)",
    "nf4",
    "fp8",
    *(f"ecsq(step={step})" for step in (-96, -32, 32)),
)
"""The entropy-coded codec at about 3, 2 and 1.2 bits."""


@dataclass(frozen=True)
class Timed:
    """Something to time. `prepare` runs before the clock starts."""

    codec: str
    spec: str
    label: Label
    prepare: Callable[[KV], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    n_bits: Callable[[Any], float]


@dataclass(frozen=True)
class Speed:
    """Medians over repeats. `peak_mb`: memory above what was held before; None where the system does not tell."""

    bits_per_element: float
    encode_gbps: float
    decode_gbps: float
    memcpy_gbps: float
    peak_mb: float | None


def timed_codec(spec: str) -> Timed:
    """One of our codecs: header, segments and checksums included."""
    codec = CODECS.parse(spec)
    return Timed(
        codec.name,
        repr(codec),
        "ours",
        prepare=lambda kv: kv,
        encode=lambda kv: (kv.geometry, message_of(codec, kv)),
        decode=lambda sent: decode(unpack(sent[1]), sent[0]),
        n_bits=lambda sent: 8.0 * len(sent[1]),
    )


def timed_peer(peer: Peer) -> Timed:
    """A peer, whose cache is in bfloat16 before it starts."""
    return Timed(
        peer.codec,
        peer.spec,
        peer.label,
        prepare=lambda kv: [(keys.bfloat16(), values.bfloat16()) for keys, values in layers_of(kv, 0)],
        encode=peer.encode,
        decode=lambda packet: peer.decode(packet.parts),
        n_bits=lambda packet: packet.n_bits,
    )


def measure_speed(timed: Timed, geometry: str, repeats: int, seed: int = 0) -> Speed:
    """Time `repeats` rounds over fresh caches of `N_TOKENS` tokens."""
    rounds = ([timed.prepare(kv) for kv in caches] for caches in synthetic_caches(geometry, seed))
    _round(timed, next(rounds))
    rows = [_round(timed, next(rounds)) for _ in range(repeats)]
    bits, encode, decode_, copied = (median(column) for column in zip(*rows, strict=True))
    return Speed(bits, encode, decode_, copied, _peak_mb(timed, next(rounds)))


def _round(timed: Timed, caches: list[Any]) -> tuple[float, float, float, float]:
    copied = memcpy_gbps()
    start = time.perf_counter()
    sent = [timed.encode(cache) for cache in caches]
    middle = time.perf_counter()
    for message in sent:
        timed.decode(message)
    end = time.perf_counter()
    n_numbers = sum(map(_count, caches))
    bits = sum(map(timed.n_bits, sent)) / n_numbers
    gigabytes = 2 * n_numbers / 1e9
    return bits, gigabytes / (middle - start), gigabytes / (end - middle), copied


def _peak_mb(timed: Timed, caches: list[Any]) -> float | None:
    """Of one cache, in a round of its own: giving memory back first would cost the others time."""
    with peak_memory() as peak:
        timed.decode(timed.encode(caches[0]))
    return peak[0]


def _count(cache: KV | list[tuple[Tensor, Tensor]]) -> int:
    if isinstance(cache, KV):
        return cache.n_tokens * cache.geometry.floats_per_token
    return sum(keys.numel() + values.numel() for keys, values in cache)


def memcpy_gbps() -> float:
    """Gigabytes per second that one thread copies, 64 MB at a time, best of three."""
    source, target = np.ones(_COPIED, np.uint8), np.zeros(_COPIED, np.uint8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return _COPIED / min(times) / 1e9


def synthetic_caches(name: str, seed: int) -> Iterator[list[KV]]:
    """Endless rounds of caches, a million numbers or more each: normal, with means and deviations by channel."""
    n_layers, heads, dim = GEOMETRIES[name]
    layer = LayerGeometry(heads, dim, dim, NO_ROTATION)
    geometry = Geometry((layer,) * n_layers, model="0" * 64, tokenizer="0" * 64)
    random = torch.Generator().manual_seed(seed)
    shape = (2, n_layers, 1, heads, 1, dim)
    deviations = 2 ** (4 * torch.rand(shape, generator=random) - 2)
    means = 2 * deviations * torch.randn(shape, generator=random)
    n_caches = -(-N_NUMBERS // (N_TOKENS * geometry.floats_per_token))
    while True:
        yield [_cache(geometry, means, deviations, random) for _ in range(n_caches)]


def _cache(geometry: Geometry, means: Tensor, deviations: Tensor, random: torch.Generator) -> KV:
    normal = torch.randn(*means.shape[:4], N_TOKENS, means.shape[-1], generator=random)
    keys, values = means + deviations * normal
    layers = tuple(range(geometry.n_layers))
    return KV(
        geometry,
        (Group(layers, keys, values.bfloat16()),),
        present=torch.ones(len(layers), 1, N_TOKENS, dtype=torch.bool),
        positions=torch.arange(N_TOKENS).view(1, 1, -1),
        spans=(plain_spans(N_TOKENS, Role.TEXT),),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(found)
