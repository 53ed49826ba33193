"""A map between layers that is learned: soft while it is trained, and sparse, so that few layers remain to be read."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.layer_map import distances
from kvferry.errors import UsageError


class LayerWeights(nn.Module):
    """For each receiver layer, weights of the sender's layers: never negative, of sum one, most of them exactly zero.

    Without `active` by sparsemax (arXiv:1602.02068), which finds itself how many layers stay; with it, the softmax of
    the `active` highest, which weighs those it has and hardly takes in others. It starts around the layer nearest in
    depth, with several layers above zero: one at zero gets no gradient, so a map that starts with one layer would keep
    it. `LAYER_MAPS.parse("learned")` reads off the result.
    """

    def __init__(self, n_sender: int, n_receiver: int, active: int | None = None) -> None:
        super().__init__()
        if active is not None and active < 1:
            raise UsageError(f"{active} active layers", cure="Keep at least one")
        self.active = active
        self.logits = nn.Parameter(-distances(n_sender, n_receiver).float())

    def forward(self) -> Float[Tensor, "receiver sender"]:
        return sparsemax(self.logits) if self.active is None else softmax_of_highest(self.logits, self.active)

    def mix(self, states: Float[Tensor, "sender *rest"]) -> Float[Tensor, "receiver *rest"]:
        """Stacked layers of the sender, which must be of one shape, as seen by each layer of the receiver."""
        return torch.tensordot(self(), states, dims=1)


def sparsemax(logits: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """The point of the simplex nearest to each row (Martins and Astudillo, arXiv:1602.02068).

    >>> sparsemax(torch.tensor([1.0, 0.5, -3.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    ordered = logits.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    n_kept = (ordered * rank > excess).sum(-1, keepdim=True)
    return (logits - excess.gather(-1, n_kept - 1) / n_kept).clamp(min=0)


def softmax_of_highest(logits: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """Softmax of the `k` highest of each row, zero for the others.

    >>> softmax_of_highest(torch.tensor([2.0, 2.0, 1.0]), 2).tolist()
    [0.5, 0.5, 0.0]
    """
    highest = logits.topk(min(k, logits.shape[-1]), -1).indices
    hidden = torch.ones_like(logits, dtype=torch.bool).scatter(-1, highest, False)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)
