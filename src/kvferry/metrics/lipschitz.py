"""Lipschitz constants of maps between caches: how much larger an error may leave than it came in, in the L2 norm.

Exact for a linear map (its largest singular value); for a composition the product of its parts' constants, and for a
sum their sum, which are upper bounds (Szegedy et al., arXiv:1312.6199, section 4.3).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import UncertifiableMap

SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Dropout: 1.0,  # a map in use does not drop
    nn.ReLU: 1.0,
    nn.LeakyReLU: 1.0,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.GELU: 1.129,  # 1.12890 at 1.4142, and 1.12899 in the tanh form
    nn.SiLU: 1.0999,  # 1.09984 at 2.3994
}
"""The steepest slope of each activation, rounded up."""

_CURE = "Certify a map of linear layers and activations, or measure its error instead"

_NORMALISES = "divides by the spread of its input: only its eps bounds its slope, at 1 / sqrt(eps), about 316"
_WITHOUT = {
    "LayerNorm": _NORMALISES,
    "RMSNorm": _NORMALISES,
    "StackedNorm": _NORMALISES,
    "MultiheadAttention": "multiplies inputs with one another, so that its slope grows with them",
}


def spectral_norm(matrix: Float[Tensor, "rows columns"]) -> float:
    """The largest singular value, from the eigenvalues of the smaller Gram matrix, in fp64.

    >>> spectral_norm(torch.diag(torch.tensor([3.0, -4.0])))
    4.0
    """
    exact = matrix.detach().double()
    gram = exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))) if gram.numel() else 0.0


def sequence_norm(blocks: Float[Tensor, "neighbours rows columns"]) -> float:
    """Of the map of a whole sequence whose token t is the sum of `blocks[b]` times token t - b: an upper bound.

    The map is a block-Toeplitz matrix. Its norm is at most the sum of the norms of its blocks (triangle inequality over
    shifts), and at most sqrt(neighbours) times the norm of the blocks side by side (each token is read so often).
    """
    beside = spectral_norm(torch.cat(list(blocks), -1))
    return min(sum(spectral_norm(block) for block in blocks), math.sqrt(len(blocks)) * beside)


def require_slope(module: nn.Module) -> None:
    """Raise `UncertifiableMap` with the reason if a module of this kind has no useful Lipschitz constant."""
    kind = type(module).__name__
    if kind in _WITHOUT:
        raise UncertifiableMap(f"{kind} {_WITHOUT[kind]}", cure=_CURE)


def module_norm(module: nn.Module) -> float:
    """An upper bound on the Lipschitz constant of linear layers and activations one after the other.

    Raises `UncertifiableMap` for a module that has no useful one, or is not known here.

    >>> double = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(double.weight)
    >>> module_norm(nn.Sequential(double, nn.ReLU(), double))
    1.0
    """
    if isinstance(module, nn.Sequential):
        return math.prod(module_norm(part) for part in module)
    if isinstance(module, nn.Linear):
        return spectral_norm(module.weight.detach())
    if type(module) in SLOPES:
        return max(SLOPES[type(module)], abs(float(getattr(module, "negative_slope", 0.0))))
    require_slope(module)
    raise UncertifiableMap(f"{type(module).__name__} is not known to this proof", cure=_CURE)
