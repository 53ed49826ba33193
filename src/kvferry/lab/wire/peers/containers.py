"""safetensors in bfloat16, and the first draft's own layout, KVWire v1: absmax integers, a float16 scale per vector."""

from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from kvferry.lab.wire.peers.peer import Layers, Packet, Peer, each_tensor, simulated

_HEADER = 16  # bytes: version, modes, counts
_INDEX = 16  # bits for the position of a token


def container_peers() -> list[Peer]:
    drafts = [simulated("kvwire-v1", f"bits={bits}", partial(_draft, bits=bits)) for bits in (8, 4)]
    return [Peer("safetensors", "bfloat16", "real", _save, _load, timed=True), *drafts]


def _save(layers: Layers) -> Packet:
    names = [(f"{index}.k", f"{index}.v") for index in range(len(layers))]
    both = zip(names, layers, strict=True)
    tensors = {
        name: part.bfloat16().contiguous()
        for pair, parts in both
        for name, part in zip(pair, parts, strict=True)
    }
    data = save(tensors)
    return Packet(8.0 * len(data), data)


def _load(data: bytes) -> Layers:
    tensors = load(data)
    return [
        (tensors[f"{index}.k"].float(), tensors[f"{index}.v"].float()) for index in range(len(tensors) // 2)
    ]


def _draft(layers: Layers, bits: int) -> tuple[Layers, float]:
    decoded, n_bits = each_tensor(partial(_by_vector, bits=bits))(layers)
    return decoded, n_bits + 8 * _HEADER + _INDEX * layers[0][0].shape[1]


def _by_vector(vectors: Tensor, bits: int) -> tuple[Tensor, float]:
    highest = 2 ** (bits - 1) - 1
    scales = (vectors.abs().amax(-1, keepdim=True) / highest).clamp(2.0**-24, 65504.0).half().float()
    codes = torch.clamp((vectors / scales).round(), -highest, highest)
    return codes * scales, float(bits * vectors.numel() + 16 * scales.numel())
