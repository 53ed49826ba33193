"""The mean of each channel of the keys, which `centred` codecs subtract and send in float16.

Keys have channels far from zero that hardly move; without the mean they set the scale of every group they are in.
"""

import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

_UNIT, _LARGEST = 2.0**24, 65504.0


def channel_means(
    keys: Float[Tensor, "*batch tokens dim"], counts: Int[Tensor, "*#batch"]
) -> Float16[Tensor, "*batch dim"]:
    """The means over `counts` tokens; those that do not count must be zero.

    Sums are of whole multiples of 2**-24, the smallest float16, hence equal in any order, batch and device.

    >>> channel_means(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor(2))
    tensor([2., 2.], dtype=torch.float16)
    """
    whole = (keys.float().clamp(-_LARGEST, _LARGEST) * _UNIT).round().to(torch.int64)
    units = counts.clamp(min=1).float().unsqueeze(-1) * _UNIT
    return (whole.sum(-2).float() / units).clamp(-_LARGEST, _LARGEST).half()
