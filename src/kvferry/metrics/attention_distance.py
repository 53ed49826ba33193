"""How far attention over one cache is from attention over another, for the same queries: what is read, and weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import ShapeMismatch
from kvferry.metrics.attention import Scores, attention_logits, attention_outputs, softmax_seen


@dataclass(frozen=True)
class Slots:
    """One layer's keys, in the key space of the queries, its values, and which slots each query sees."""

    keys: Float[Tensor, "batch heads tokens dim"]
    values: Float[Tensor, "batch heads tokens value_dim"]
    visible: Bool[Tensor, "batch new tokens"]

    def cleaned(self) -> "Slots":
        """Zero where no query looks: a masked NaN is still a NaN after weight times value."""
        unseen = ~self.visible.any(1)[:, None, :, None]
        keys, values = (part.masked_fill(unseen, 0.0) for part in (self.keys, self.values))
        return Slots(keys, values, self.visible)

    def detached(self) -> "Slots":
        return Slots(self.keys.detach(), self.values.detach(), self.visible)


def attention_output_error(
    queries: Float[Tensor, "batch queries new dim"],
    got: Slots,
    want: Slots,
    mask: Bool[Tensor, "batch new"],
    scores: Scores,
) -> Float[Tensor, " queries"]:
    """By query head, the squared error of what the queries in `mask` read, over the square of what they should.

    0 is equal, 1 what zeros would give; where only zeros should be read, the squared error itself. Differentiable, also
    at zero. The two may differ in slots. Raises `ShapeMismatch`.

    >>> see, one = torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 1, 1)
    >>> attention_output_error(one, Slots(one, 3 * one, see), Slots(one, 2 * one, see), see[0], Scores(1.0)).tolist()
    [0.25]
    """
    held = mask[:, None, :, None]
    reads, wanted = (
        attention_outputs(queries, slots.keys, slots.values, slots.visible, scores) * held
        for slots in (got.cleaned(), want.cleaned())
    )
    error, size = (part.square().sum((0, 2, 3)) for part in (reads - wanted, wanted))
    return error / torch.where(size > 0, size, 1.0)


def attention_kl(
    queries: Float[Tensor, "batch queries new dim"], got: Slots, want: Slots, scores: Scores
) -> Float[Tensor, "batch queries new"]:
    """KL(weights over `want` || weights over `got`), slot by slot, in nats, by read; differentiable.

    Over the slots that are visible in both; a sink is one more outcome, which keys do not move. Zero for a query that
    sees nothing. Raises `ShapeMismatch` for different numbers of slots.

    >>> see = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> keys = torch.tensor([[[[0.0], [1.0]]]])
    >>> got, want = Slots(0 * keys, keys, see), Slots(keys, keys, see)
    >>> round(attention_kl(torch.ones(1, 1, 1, 1), got, want, Scores(1.0)).item(), 4)
    0.1109
    """
    if got.visible.shape != want.visible.shape:
        what = f"{got.visible.shape[-1]} slots against {want.visible.shape[-1]}"
        raise ShapeMismatch(what, cure="Weights of other slots cannot be compared; what is read can")
    visible = got.visible & want.visible
    found, wanted = (attention_logits(queries, slots.cleaned().keys, scores) for slots in (got, want))
    weights = softmax_seen(wanted, visible, scores.sinks)
    # From logits: a weight that rounds to zero has no logarithm.
    moved = (weights * (wanted - found)).sum(-1)
    return moved + _log_total(found, visible, scores) - _log_total(wanted, visible, scores)


def _log_total(
    logits: Float[Tensor, "batch queries new tokens"],
    visible: Bool[Tensor, "batch new tokens"],
    scores: Scores,
) -> Float[Tensor, "batch queries new"]:
    """Logarithm of the softmax's denominator."""
    seen = logits.masked_fill(~visible.unsqueeze(1), torch.finfo(logits.dtype).min).logsumexp(-1)
    return seen if scores.sinks is None else torch.logaddexp(seen, scores.sinks.to(seen).view(1, -1, 1))
