"""After TurboQuant (arXiv:2504.19874), its form for mean squared error: each head vector is turned at random, and
every coordinate takes the nearest of the best levels for a Gaussian; the norm travels in float16."""

import math
from functools import cache, partial
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from kvferry.lab.wire.peers.peer import Peer, each_tensor, simulated

BITS = (2, 3, 4, 5, 6)
_N_STEPS = 2000


def turboquant_peers() -> list[Peer]:
    return [simulated("turboquant", f"bits={b}", each_tensor(partial(_quantise, bits=b))) for b in BITS]


def _quantise(vectors: Tensor, bits: int) -> tuple[Tensor, float]:
    dim = vectors.shape[-1]
    norms = vectors.norm(dim=-1, keepdim=True).half().float()
    turned = (vectors @ _rotation(dim)) / norms.clamp(min=1e-12) * math.sqrt(dim)
    levels = torch.tensor(gaussian_levels(bits))
    nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
    # The decoder knows the norm, and the norm of the levels that were chosen.
    back = nearest / nearest.norm(dim=-1, keepdim=True).clamp(min=1e-12) * norms
    return back @ _rotation(dim).T, float(vectors.numel() * bits + 16 * norms.numel())


@cache
def _rotation(dim: int) -> Tensor:
    """One orthogonal matrix per width, the same at both ends."""
    made = torch.randn(dim, dim, generator=torch.Generator().manual_seed(42))
    return torch.linalg.qr(made).Q


@cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """Lloyd's and Max's levels of a standard Gaussian, by their fixed-point iteration.

    >>> [round(level, 3) for level in gaussian_levels(2)]
    [-1.51, -0.453, 0.453, 1.51]
    """
    normal, n = NormalDist(), 2**bits
    levels = [normal.inv_cdf((i + 0.5) / n) for i in range(n)]
    for _ in range(_N_STEPS):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [
            (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a)) for a, b in pairwise(edges)
        ]
    return tuple(levels)
