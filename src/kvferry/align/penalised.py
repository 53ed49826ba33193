"""Ridge regression where the correlations are at hand, for one map or for a stack of them."""

import torch
from jaxtyping import Float
from torch import Tensor


def penalised(
    xx: Float[Tensor, "*batch features features"], xy: Float[Tensor, "*batch features out"], penalty: float
) -> Float[Tensor, "*batch features out"]:
    """The weights `(xx + penalty)^-1 xy`; where features are standardised, `penalty` is relative to their variance."""
    eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
    return torch.linalg.solve(xx + penalty * eye, xy)
