"""Memory to read a cache into."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_LARGE_PAGE = 1 << 21


def fresh(shape: tuple[int, ...], whole: bool, device: torch.device) -> Float[Tensor, "..."]:
    """Zeros in float32; any numbers at all where the `whole` of it will be filled."""
    if not whole:
        return torch.zeros(shape, device=device)
    if device.type != "cpu" or 4 * math.prod(shape) < _LARGE_PAGE // 2:
        return torch.empty(shape, device=device)
    # numpy asks for large pages, where they fit: fetching as many small ones takes longer than decoding.
    n_bytes = 4 * math.prod(shape)
    room = np.empty(n_bytes + 2 * _LARGE_PAGE, np.uint8)
    start = -room.ctypes.data % _LARGE_PAGE
    return torch.from_numpy(room[start : start + n_bytes].view(np.float32).reshape(shape))
