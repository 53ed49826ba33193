"""How far what a query reads can move when keys and values are off: bounds that hold, and what was measured.

Derivation in docs/theory.md. Let the arguments of one softmax be off by d_i, and r = (max d - min d) / 2 over what the
query sees. The weights then move by at most tanh(r / 2) in total variation, and what is read by at most

    max_i |dv_i|  +  2 tanh(r / 2) max_i |v_i - c|        for any point c.

Rule 1: r counts only visible slots, and a sink as a slot whose argument is right and whose value is zero.
Rule 2: an error that all arguments share moves nothing; r is never more than max_i |d_i|.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.metrics.attention import Scores, attention_logits, softmax_seen

Keys = Float[Tensor, "batch heads tokens dim"]
Values = Float[Tensor, "batch heads tokens value_dim"]
Seen = Bool[Tensor, "batch new tokens"]
PerRead = Float[Tensor, "batch queries new"]


def total_variation_bound(shift: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The most that softmax weights move in total variation when no argument is off by more than `shift`.

    Reached by two slots of weights 1 / (1 + exp(-shift)) and the rest, pushed apart by `shift` each.

    >>> total_variation_bound(torch.tensor([0.0, 2.0])).tolist()
    [0.0, 0.7615941762924194]
    """
    return torch.tanh(shift / 2)


def output_bound(
    shift: Float[Tensor, "*n"], value_error: Float[Tensor, "*n"], radius: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The most that what is read moves, for values in a ball of `radius`, each off by at most `value_error`."""
    return value_error + 2 * total_variation_bound(shift) * radius


def half_range(errors: Float[Tensor, "batch queries new tokens"], visible: Seen, scores: Scores) -> PerRead:
    """Half the distance between the largest and the smallest error of the arguments of each softmax."""
    hidden, inf = ~visible.unsqueeze(1), torch.inf
    high, low = errors.masked_fill(hidden, -inf).amax(-1), errors.masked_fill(hidden, inf).amin(-1)
    if scores.sinks is not None:
        high, low = high.clamp(min=0), low.clamp(max=0)
    return ((high - low) / 2).clamp(min=0)  # -inf where nothing is seen


@dataclass(frozen=True)
class ReadErrors:
    """By read (query head, query): what was off, how far the read moved, and how far it could have.

    `trivial` is what any two reads of values of these sizes differ by at most: a bound of that size says nothing.
    """

    shift: PerRead
    total_variation: PerRead
    moved: PerRead
    value_error: PerRead
    radius: PerRead
    trivial: PerRead

    @property
    def bound(self) -> PerRead:
        """From the errors of the very keys and values that arrived."""
        return output_bound(self.shift, self.value_error, self.radius)


def read_errors(
    queries: Float[Tensor, "batch queries new dim"],
    clean: tuple[Keys, Values],
    coded: tuple[Keys, Values],
    visible: Seen,
    scores: Scores,
) -> ReadErrors:
    """Compare what the same queries read from two caches of one layer, in the key space of the queries."""
    (keys, values), (coded_keys, coded_values) = clean, coded
    before, after = (attention_logits(queries, part, scores) for part in (keys, coded_keys))
    weights, coded_weights = (softmax_seen(part, visible, scores.sinks) for part in (before, after))
    moves, share = coded_weights - weights, queries.shape[1] // keys.shape[1]
    sinks = moves.sum(-1).abs() if scores.sinks is not None else 0.0
    values, coded_values = (
        part.to(moves.dtype).repeat_interleave(share, 1) for part in (values, coded_values)
    )
    return ReadErrors(
        shift=half_range(after - before, visible, scores),
        total_variation=(moves.abs().sum(-1) + sinks) / 2,
        moved=(coded_weights @ coded_values - weights @ values).norm(dim=-1),
        value_error=largest(coded_values - values, visible),
        radius=_radius(coded_values, visible, scores),
        trivial=largest(values, visible) + largest(coded_values, visible),
    )


def largest(vectors: Float[Tensor, "batch queries tokens value_dim"], visible: Seen) -> PerRead:
    """The largest norm among the slots that each query sees; 0 where it sees none."""
    return (vectors.norm(dim=-1).unsqueeze(-2) * visible.unsqueeze(1)).amax(-1)


def _radius(
    values: Float[Tensor, "batch queries tokens value_dim"], visible: Seen, scores: Scores
) -> PerRead:
    """Of a ball around the mean of all slots that holds every visible value, and zero where there is a sink."""
    held = visible.any(1)[:, None, :, None]
    centre = (values * held).sum(-2, keepdim=True) / held.sum(-2, keepdim=True).clamp(min=1)
    radius = largest(values - centre, visible)
    return radius if scores.sinks is None else torch.maximum(radius, centre.norm(dim=-1))
