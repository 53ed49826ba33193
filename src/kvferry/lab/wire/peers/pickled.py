"""What is written in an afternoon: pickle with zstd over int8 per tensor (the first draft's TokenEncoder), torch.save.

Whoever loads such bytes runs what they say. This is the one file of the package that unpickles, and only bytes that
it has just made itself.
"""

import io
import pickle
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from kvferry.lab.wire.peers.peer import Layers, Packet, Peer


def pickled_peers() -> list[Peer]:
    return [
        Peer("pickle-zstd", "int8 per tensor", "real", _pickle, _unpickle, timed=True),
        Peer("torch.save", "bfloat16", "real", _save, _load, timed=True),
    ]


def _pickle(layers: Layers) -> Packet:
    tensors = [part for pair in layers for part in pair]
    # The draft divides by zero for a tensor of zeros.
    scales = [(tensor.abs().max() / 127.0).clamp(min=1e-30) for tensor in tensors]
    codes = [(t / s).round().clamp(-128, 127).to(torch.int8) for t, s in zip(tensors, scales, strict=True)]
    flat = np.concatenate([code.numpy().ravel() for code in codes])
    data = pickle.dumps({"kv_data": flat, "scales": list(zip(scales[::2], scales[1::2], strict=True))})
    packed = zstandard.ZstdCompressor(level=3).compress(data)
    # Shapes are lost on the way: the draft's receiver must know them.
    return Packet(8.0 * len(packed), (packed, [tensor.shape for tensor in tensors]))


def _unpickle(parts: tuple[bytes, list[torch.Size]]) -> Layers:
    packed, shapes = parts
    found: dict[str, Any] = pickle.loads(zstandard.ZstdDecompressor().decompress(packed))
    scales: list[Tensor] = [scale for pair in found["scales"] for scale in pair]
    cuts = np.cumsum([shape.numel() for shape in shapes])[:-1]
    codes = np.split(found["kv_data"], cuts)
    values = [
        torch.from_numpy(code).float().view(shape) * scale
        for code, shape, scale in zip(codes, shapes, scales, strict=True)
    ]
    return list(zip(values[::2], values[1::2], strict=True))


def _save(layers: Layers) -> Packet:
    buffer = io.BytesIO()
    torch.save([(keys.bfloat16(), values.bfloat16()) for keys, values in layers], buffer)
    return Packet(8.0 * len(buffer.getvalue()), buffer.getvalue())


def _load(data: bytes) -> Layers:
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    return [(keys.float(), values.float()) for keys, values in loaded]
