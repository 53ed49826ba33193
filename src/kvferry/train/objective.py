"""What a map is trained on: how the receiver goes on behind the mapped cache, piece by piece of a batch.

    answer     cross-entropy of the scored tokens
    own_text   divergence from what the receiver itself predicts there, having read the context as text

The second says of every token what the receiver could know, not only which one came, so it learns more from less text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kvferry.errors import UnknownName
from kvferry.kv import KV
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.state import empty, read
from kvferry.models.tokens import join
from kvferry.train.answer_loss import Continuations, continuations
from kvferry.train.examples import Example
from kvferry.train.loop import Loss

TERMS = ("answer", "own_text")


@dataclass(frozen=True)
class Objective:
    """The weighted sum of terms for one receiver. Raises `UnknownName` for a term that does not exist."""

    receiver: Model
    weights: Mapping[str, float]
    stride: float

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in TERMS:
                raise UnknownName("loss", name, TERMS)

    def __call__(self, aligned: KV, examples: Sequence[Example]) -> Loss:
        """The loss behind an aligned cache of the examples' contexts. Differentiable in the cache."""
        after = continuations(self.receiver, examples)
        _, logits = take_over(self.receiver, aligned, self.stride, after.tokens, keep=0)
        scored = after.scored[:, 1:].to(logits.device)
        predicted = logits[:, :-1][scored].float().log_softmax(-1)
        terms = {name: self._term(name, predicted, after, examples) for name in self.weights}
        total = sum((weight * terms[name] for name, weight in self.weights.items()), predicted.new_zeros(()))
        return Loss(total, float(scored.sum()), {name: term.detach() for name, term in terms.items()})

    def _term(
        self,
        name: str,
        predicted: Float[Tensor, "scored vocab"],
        after: Continuations,
        examples: Sequence[Example],
    ) -> Float[Tensor, ""]:
        if name == "answer":
            ids = after.tokens.ids[:, 1:][after.scored[:, 1:]].to(predicted.device)
            return functional.nll_loss(predicted, ids, reduction="sum")
        own = _own(self.receiver, after, examples)
        return functional.kl_div(predicted, own, reduction="sum", log_target=True)


@torch.no_grad()
def _own(receiver: Model, after: Continuations, examples: Sequence[Example]) -> Float[Tensor, "scored vocab"]:
    """Log-probabilities at the scored tokens, the context read as text."""
    contexts = receiver.contexts([example.context for example in examples])
    n_after = after.tokens.ids.shape[1]
    logits = read(empty(receiver, len(examples)), join(contexts, after.tokens), keep=n_after)
    scored = after.scored[:, 1:].to(logits.device)
    return logits[:, :-1][scored].float().log_softmax(-1)
