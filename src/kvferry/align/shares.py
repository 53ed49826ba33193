"""Two rows of unlike length laid over each other: how much of each cell of one is covered by each cell of the other."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def shares(
    held: Int[Tensor, "*held"],
    n_held: Int[Tensor, "..."],
    sent: Int[Tensor, "*sent"],
    n_sent: Int[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """The share of cell `held` of `n_held` that lies in cell `sent` of `n_sent`; over all `sent` it sums to one.

    In whole numbers up to the last division, so that it is exactly one or zero where both rows are of one length.
    """
    ends = torch.minimum((held + 1) * n_sent, (sent + 1) * n_held)
    begins = torch.maximum(held * n_sent, sent * n_held)
    return ((ends - begins).clamp(min=0).double() / n_sent).float()


def share_matrix(n_held: int, n_sent: int) -> Float[Tensor, "held sent"]:
    """`shares` of all cells.

    >>> share_matrix(2, 3)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.6667]])
    """
    held, sent = torch.arange(n_held).unsqueeze(-1), torch.arange(n_sent)
    return shares(held, torch.tensor(n_held), sent, torch.tensor(n_sent))
