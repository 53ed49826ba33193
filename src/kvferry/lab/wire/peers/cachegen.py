"""CacheGen as LMCache ships it (arXiv:2310.07240): one scale per layer and token, arithmetic coding by channel.

Its tables travel with the data: per layer and channel a distribution of `bins + 1` int16 and an int32 length, per
layer and token a bfloat16 scale. `real` runs LMCache's own coder where its package is installed; `like` counts the
entropy of the symbols for it, which no coder beats.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.lab.wire.peers.peer import Layers, Packet, Peer, simulated

KNOBS = (8, 12, 16, 24, 32, 64)
_TABLE_BINS = 32  # tables are as wide as the widest layer
_KERNELS = Path("v1", "platform", "torch_ops", "cachegen_kernels.py")
Bins = Callable[[int, bool], int]


def shipped_bins(layer: int, is_key: bool) -> int:
    """How many bins a layer has by default.

    >>> [shipped_bins(layer, is_key) for layer in (1, 5, 12) for is_key in (True, False)]
    [32, 32, 32, 16, 16, 16]
    """
    return 32 if layer < (10 if is_key else 2) else 16


def cachegen_peers() -> list[Peer]:
    """As shipped, by formula; and with tables only as wide as each layer's bins, which nobody ships."""
    shipped = partial(_simulate, bins=shipped_bins, table_bins=_TABLE_BINS)
    tight = partial(_simulate, bins=shipped_bins, table_bins=None)
    return [
        simulated("cachegen", "bins=shipped", shipped),
        simulated("cachegen-tight", "bins=shipped", tight),
    ]


def cachegen_curve() -> list[Peer]:
    """One number of bins everywhere, as a knob that the original does not have."""
    return [
        simulated("cachegen-bins", f"bins={n}", partial(_simulate, bins=partial(_same, n=n), table_bins=None))
        for n in KNOBS
    ]


def lmcache_peers() -> list[Peer]:
    """LMCache's own coder. Raises `UsageError` without the package."""
    kernels = _kernels()
    return [
        Peer("cachegen-lmcache", "bins=shipped", "real", partial(_encode, kernels), partial(_decode, kernels))
    ]


def _same(layer: int, is_key: bool, n: int) -> int:
    return n


def _simulate(layers: Layers, bins: Bins, table_bins: int | None) -> tuple[Layers, float]:
    """Tables of `table_bins`, or of the bins of each layer."""
    decoded, n_bits = [], 0.0
    for index, pair in enumerate(layers):
        widths = bins(index, True), bins(index, False)
        done = [_through(part, n, table_bins or n) for part, n in zip(pair, widths, strict=True)]
        decoded.append((done[0][0], done[1][0]))
        n_bits += sum(bits for _, bits in done)
    return decoded, n_bits


def _through(part: Tensor, bins: int, table_bins: int) -> tuple[Tensor, float]:
    codes, scales = quantise(part, bins)
    n_bits = entropy_bits(codes) + side_bits(part, table_bins)
    return dequantise(codes, scales, bins, part), n_bits


def side_bits(part: Tensor, table_bins: int) -> float:
    """Distributions, stream lengths and scales of keys or values of one layer.

    >>> side_bits(torch.zeros(2, 128, 4), table_bins=32)  # 8 channels of 33 x 16 + 32, 128 scales of 16
    6528.0
    """
    heads, tokens, dim = part.shape
    return float(heads * dim * (16 * (table_bins + 1) + 32) + 16 * tokens)


def entropy_bits(codes: Tensor) -> float:
    """Bits of the symbols of each channel under that channel's own frequencies; `codes` is `[tokens, channels]`."""
    counts = torch.nn.functional.one_hot(codes.long().T).sum(1).double()  # [channels, symbols]
    return float(-(counts * (counts / len(codes)).clamp(min=1e-300).log2()).sum())


def quantise(part: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Codes `[tokens, channels]` from 0 and scales `[tokens, 1]`, over all heads of a token together."""
    rows = part.transpose(0, 1).flatten(1)
    top = bins // 2 - 1
    scales = rows.abs().amax(-1, keepdim=True).bfloat16().float().clamp(min=1e-30)
    return (rows * (top / scales) + top).round().clamp(0, 2 * top), scales


def dequantise(codes: Tensor, scales: Tensor, bins: int, like: Tensor) -> Tensor:
    """The inverse, `[heads, tokens, dim]` again."""
    top = bins // 2 - 1
    rows = (codes - top) / top * scales
    return rows.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)


def _encode(kernels: ModuleType, layers: Layers) -> Packet:
    streams = [_encode_side(kernels, layers, is_key) for is_key in (True, False)]
    return Packet(8.0 * sum(part.nbytes for stream in streams for part in stream["sent"]), streams)


def _encode_side(kernels: ModuleType, layers: Layers, is_key: bool) -> dict[str, Any]:
    """Keys or values of all layers, which must be of one shape."""
    parts = [layer[0 if is_key else 1] for layer in layers]
    done = [quantise(part, shipped_bins(index, is_key)) for index, part in enumerate(parts)]
    codes = torch.stack([codes for codes, _ in done]).to(torch.int8)
    n_layers, _, n_channels = codes.shape
    table = kernels.calculate_cdf(codes, _TABLE_BINS)
    lengths = torch.zeros(n_layers, n_channels, dtype=torch.int32)
    buffer = torch.zeros(n_layers, n_channels, 2 * codes.shape[1] + 16, dtype=torch.uint8)
    kernels.encode_fast_new(table, codes, buffer, lengths)
    used = torch.arange(buffer.shape[-1]) < lengths.unsqueeze(-1)
    scales = torch.stack([scales for _, scales in done]).bfloat16()
    return {"sent": (buffer[used], lengths, table, scales), "like": parts[0], "is_key": is_key}


def _decode(kernels: ModuleType, streams: list[dict[str, Any]]) -> Layers:
    keys, values = (_decode_side(kernels, stream) for stream in streams)
    return list(zip(keys, values, strict=True))


def _decode_side(kernels: ModuleType, stream: dict[str, Any]) -> list[Tensor]:
    data, lengths, table, scales = stream["sent"]
    codes = torch.zeros(len(scales), scales.shape[1], table.shape[1], dtype=torch.uint8)
    ends = lengths.flatten().cumsum(0).reshape(lengths.shape)
    kernels.decode_fast_prefsum(table, data, ends, codes)
    rows = zip(codes.float(), scales.float(), strict=True)
    return [
        dequantise(code, scale, shipped_bins(index, stream["is_key"]), stream["like"])
        for index, (code, scale) in enumerate(rows)
    ]


@cache
def _kernels() -> ModuleType:
    """One file of LMCache, read by its path: the package itself asks for a GPU when it is imported."""
    found = importlib.util.find_spec("lmcache")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [Path(folder) / _KERNELS for folder in folders if (Path(folder) / _KERNELS).is_file()]
    spec = importlib.util.spec_from_file_location("lmcache_cachegen_kernels", files[0]) if files else None
    if spec is None or spec.loader is None:
        raise UsageError("lmcache is not installed", cure="Run: pip install --no-deps lmcache")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # numba's cache on disk looks modules up by name
    spec.loader.exec_module(module)
    return module
