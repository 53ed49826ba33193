"""Lossless packers of bfloat16 numbers: zipnn (Huffman codes of exponents), blosc2 (byte shuffle and zstd)."""

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.errors import MissingExtra
from kvferry.lab.wire.peers.peer import Layers, Packet, Peer

Parts = tuple[Any, list[torch.Size]]


def zipnn_peers() -> list[Peer]:
    """Raises `MissingExtra` without zipnn."""
    packer = _module("zipnn").ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def encode(layers: Layers) -> Packet:
        data, shapes = _flat(layers)
        packed = packer.compress(data)
        return Packet(8.0 * len(packed), (bytes(packed), shapes))

    def decode(parts: Parts) -> Layers:
        return _layers(bytes(packer.decompress(parts[0])), parts[1])

    return [Peer("zipnn", "bfloat16", "real", encode, decode, timed=True)]


def blosc2_peers() -> list[Peer]:
    """Raises `MissingExtra` without blosc2."""
    blosc2 = _module("blosc2")
    options = {"typesize": 2, "codec": blosc2.Codec.ZSTD, "clevel": 1, "filter": blosc2.Filter.SHUFFLE}

    def encode(layers: Layers) -> Packet:
        data, shapes = _flat(layers)
        packed = blosc2.compress(data, **options)
        return Packet(8.0 * len(packed), (packed, shapes))

    def decode(parts: Parts) -> Layers:
        return _layers(blosc2.decompress(parts[0]), parts[1])

    blosc2.set_nthreads(1)
    return [Peer("blosc2", "shuffle, zstd 1", "real", encode, decode, timed=True)]


def _module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about torch
        try:
            return importlib.import_module(name)
        except ImportError:
            raise MissingExtra(name, "bench") from None


def _flat(layers: Layers) -> tuple[bytes, list[torch.Size]]:
    tensors = [part for pair in layers for part in pair]
    flat = torch.cat([tensor.bfloat16().flatten() for tensor in tensors])
    return flat.view(torch.uint8).numpy().tobytes(), [tensor.shape for tensor in tensors]


def _layers(data: bytes, shapes: list[torch.Size]) -> Layers:
    flat = torch.tensor(np.frombuffer(data, np.uint8)).view(torch.bfloat16).float()
    parts: list[Tensor] = list(flat.split([shape.numel() for shape in shapes]))
    tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return list(zip(tensors[::2], tensors[1::2], strict=True))
