"""After KIVI (arXiv:2402.02750): keys by channel in groups of 32 tokens, values by token in groups of 32 channels.

Asymmetric, float16 scale and minimum per group. The last `residual` tokens, and keys that fill no group, stay in
float16; with the published 128 nothing is compressed in messages of up to 128 tokens.
"""

from functools import partial

import torch
from torch import Tensor

from kvferry.lab.wire.peers.peer import Layers, Peer, simulated

GROUP = 32


def kivi_peers() -> list[Peer]:
    return [
        simulated(f"kivi-r{residual}", f"bits={bits}", partial(_run, bits=bits, residual=residual))
        for residual in (0, 128)
        for bits in (2, 4)
    ]


def _run(layers: Layers, bits: int, residual: int) -> tuple[Layers, float]:
    done = [(_keys(k, bits, residual), _values(v, bits, residual)) for k, v in layers]
    return [(k[0], v[0]) for k, v in done], sum(k[1] + v[1] for k, v in done)


def _keys(keys: Tensor, bits: int, residual: int) -> tuple[Tensor, float]:
    n_coded = max(0, keys.shape[1] - residual) // GROUP * GROUP
    coded, rest = keys[:, :n_coded].transpose(1, 2), keys[:, n_coded:]
    back, n_bits = minmax(coded, bits)
    return torch.cat([back.transpose(1, 2), rest.half().float()], 1), n_bits + 16 * rest.numel()


def _values(values: Tensor, bits: int, residual: int) -> tuple[Tensor, float]:
    n_coded = max(0, values.shape[1] - residual)
    back, n_bits = minmax(values[:, :n_coded], bits)
    rest = values[:, n_coded:]
    return torch.cat([back, rest.half().float()], 1), n_bits + 16 * rest.numel()


def minmax(rows: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, float]:
    """Groups of up to `group` numbers along the last axis: codes, a scale and a minimum.

    >>> minmax(torch.zeros(2, 3, 8), bits=2)[1]  # 48 codes of 2 bits, 6 groups of 32 bits
    288.0
    """
    if not rows.numel():
        return rows, 0.0
    parts = [_minmax_group(part, bits) for part in rows.split(group, dim=-1)]
    n_groups = rows[..., 0].numel() * len(parts)
    return torch.cat(parts, -1), float(rows.numel() * bits + 32 * n_groups)


def _minmax_group(rows: Tensor, bits: int) -> Tensor:
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=2.0**-24)  # flat groups
    low = low.half().float()
    return ((rows - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
