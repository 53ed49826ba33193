"""Integers with one float16 scale per group of 64 contiguous numbers of `[head, token, dim]`: the plainest baseline.

`centred` takes the message's own mean off each key channel first, in content space, and sends it in float16.
"""

from functools import partial

from torch import Tensor
from torch.nn.functional import pad

from kvferry.lab.wire.peers.peer import Layers, Peer, each_tensor, simulated

BITS = (2, 3, 4, 5, 6, 8)
GROUP = 64


def int_peers() -> list[Peer]:
    """`int-g64` at every width."""
    return [simulated("int-g64", f"bits={b}", each_tensor(partial(quantise, bits=b))) for b in BITS]


def centred_peers() -> list[Peer]:
    """`centred-g64` at every width."""
    return [simulated("centred-g64", f"bits={b}", partial(_centred, bits=b), space="content") for b in BITS]


def quantise(values: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, float]:
    """Symmetric absmax; the last group may be short.

    >>> import torch
    >>> quantise(torch.tensor([1.0, -0.5, 0.2]), bits=2, group=2)[1]  # 3 codes of 2 bits, 2 scales of 16
    38.0
    """
    n, highest = values.numel(), 2 ** (bits - 1) - 1
    groups = pad(values.flatten(), (0, -n % group)).view(-1, group)
    scales = (groups.abs().amax(-1, keepdim=True) / highest).clamp(2.0**-24, 65504.0).half().float()
    codes = (groups / scales).round().clamp(-highest, highest)
    return (codes * scales).flatten()[:n].view_as(values), float(n * bits + 16 * len(groups))


def _centred(layers: Layers, bits: int) -> tuple[Layers, float]:
    means = [keys.mean(1, keepdim=True).half().float() for keys, _ in layers]
    moved = [(keys - mean, values) for (keys, values), mean in zip(layers, means, strict=True)]
    decoded, n_bits = each_tensor(partial(quantise, bits=bits))(moved)
    back = [(keys + mean, values) for (keys, values), mean in zip(decoded, means, strict=True)]
    return back, n_bits + 16 * sum(mean.numel() for mean in means)
