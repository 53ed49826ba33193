"""What a map is trained on: by weight, how the receiver goes on behind the mapped cache, and losses between caches.

    answer     cross-entropy of the scored tokens, behind the mapped cache
    own_text   divergence from what the receiver itself predicts there, having read the context as text
    a spec     a loss of `LOSSES` between the mapped cache and the receiver's own entries, `hybrid(schedule=cosine)`

The second says of every token what the receiver could know, not only which one came, so it learns more from less text.

Rule 1: everything is a sum over the scored tokens. A loss of caches is the mean over the slots of one example, and
weighs as much as this example has scored tokens: however a batch is cut in pieces, the sum is the same.
Rule 2: a loss that needs reads has units of its own for each batch, and is the mean over the piece at hand.
Rule 3: the receiver reads a batch once behind the mapped cache, for all terms; and not at all where none asks for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from kvferry.errors import BadSpec, UnknownName
from kvferry.kv import KV
from kvferry.metrics.attention import Scores
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.scores import scores_of
from kvferry.spec import read_call
from kvferry.train.answer_loss import Continuations, continuations, full_text_logits
from kvferry.train.examples import Example
from kvferry.train.loop import Loss
from kvferry.train.losses import LOSSES
from kvferry.train.losses.base import Aid, Aids, KVLoss, over_cache
from kvferry.train.losses.moments import CacheMoments
from kvferry.train.own_side import Compared, compared, own_moments, with_reads

TERMS = ("answer", "own_text")
ByExample = dict[str, Float[Tensor, " batch"]]


def loss_of(spec: str) -> KVLoss | None:
    """The loss of caches that a name in a recipe stands for, None for one of `TERMS`.

    Raises `UnknownName` for what is neither and for options that do not exist, `BadSpec` for values out of range.

    >>> loss_of("answer")
    >>> loss_of("whitened_mse(head)").brief()
    'whitened_mse(whiten=head)'
    """
    if spec in TERMS:
        return None
    name = read_call(spec)[0]
    if name in TERMS:
        raise BadSpec(f"{spec} has options", cure=f"Write {name} alone")
    if name not in LOSSES.names():
        raise UnknownName("loss", name, (*TERMS, *LOSSES.names()))
    return LOSSES.parse(spec)


@dataclass(frozen=True)
class Objective:
    """The weighted sum of terms and losses for one receiver. Raises what `loss_of` raises.

    `moments` are for losses that whiten, see `prepared`.
    """

    receiver: Model
    weights: Mapping[str, float]
    stride: float
    moments: CacheMoments | None = None

    def __post_init__(self) -> None:
        for spec in self.weights:
            loss_of(spec)

    @classmethod
    def prepared(
        cls, receiver: Model, weights: Mapping[str, float], stride: float, examples: Sequence[Example]
    ) -> "Objective":
        """With moments of the receiver's own caches of these examples, where a loss needs them."""
        plain = cls(receiver, weights, stride)
        if "moments" not in plain.needs:
            return plain
        return cls(receiver, weights, stride, own_moments(receiver, [one.context for one in examples]))

    def __call__(self, aligned: KV, examples: Sequence[Example], step: int = 0) -> Loss:
        """The loss behind an aligned cache of the examples' contexts. Differentiable in the cache.

        `step` is for losses with a schedule. Raises `UsageError` where a loss lacks moments.
        """
        after = continuations(self.receiver, examples)
        contexts = [example.context for example in examples]
        said = self._said(aligned, contexts, after)
        parts = {name: nats.sum() for name, nats in said.items() if name in self.weights}
        if self.losses:
            parts |= self._between_caches(aligned, contexts, after, said.get("own_text"), step)
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        n_scored = float(after.scored[:, 1:].sum())
        return Loss(torch.as_tensor(total), n_scored, {name: part.detach() for name, part in parts.items()})

    @cached_property
    def losses(self) -> dict[str, KVLoss]:
        """Those of caches, by the spec that stands in the recipe."""
        found = {spec: loss_of(spec) for spec in self.weights}
        return {spec: loss for spec, loss in found.items() if loss is not None}

    @cached_property
    def needs(self) -> frozenset[Aid]:
        """Whatever any of them needs."""
        return frozenset().union(*(loss.needs for loss in self.losses.values()))

    @cached_property
    def _scores(self) -> tuple[Scores, ...]:
        return scores_of(self.receiver)

    def _said(self, aligned: KV, contexts: Sequence[str], after: Continuations) -> ByExample:
        """Nats of each term that is asked for, by example."""
        task = {"own_text"} if "task" in self.needs else set()
        wanted = [term for term in TERMS if term in {*self.weights, *task}]
        if not wanted:
            return {}
        _, logits = take_over(self.receiver, aligned, self.stride, after.tokens, keep=0)
        scored = after.scored[:, 1:].to(logits.device)
        predicted = logits[:, :-1][scored].float().log_softmax(-1)
        nats = {term: self._nats(term, predicted, contexts, after) for term in wanted}
        return {term: _by_example(each, scored) for term, each in nats.items()}

    def _nats(
        self,
        term: str,
        predicted: Float[Tensor, "scored vocab"],
        contexts: Sequence[str],
        after: Continuations,
    ) -> Float[Tensor, " scored"]:
        if term == "answer":
            ids = after.tokens.ids[:, 1:][after.scored[:, 1:]].to(predicted.device)
            return functional.nll_loss(predicted, ids, reduction="none")
        own = full_text_logits(self.receiver, contexts, after).float().log_softmax(-1)
        return functional.kl_div(predicted, own, reduction="none", log_target=True).sum(-1)

    def _between_caches(
        self,
        aligned: KV,
        contexts: Sequence[str],
        after: Continuations,
        own_text: Float[Tensor, " batch"] | None,
        step: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """Each loss of caches and, as `spec/name`, what it tells beside, summed over the scored tokens."""
        found = compared(self.receiver, aligned, contexts)
        if "reads" in self.needs:
            found = with_reads(found, self.receiver, contexts, after.tokens, self.stride, self._scores)
        parts: dict[str, Float[Tensor, ""]] = {}
        for spec, loss in self.losses.items():
            summed = self._summed(loss.at(step), found, own_text, after.scored[:, 1:].sum(-1).tolist())
            parts |= {f"{spec}{name}": part for name, part in summed.items()}
        return parts

    def _summed(
        self, loss: KVLoss, found: Compared, own_text: Float[Tensor, " batch"] | None, n_scored: list[int]
    ) -> dict[str, Float[Tensor, ""]]:
        terms = []
        for rows in _pieces(loss, len(n_scored)):
            n = sum(n_scored[row] for row in rows)
            # full_text_kl of these rows: the receiver has read behind this very cache, all of them at once.
            task = None if own_text is None else own_text[rows].sum() / max(n, 1)
            aids = Aids(self.moments, found.reads, None if task is None else lambda _, task=task: task)
            value, told = over_cache(loss, *found.take(rows), aids)
            terms.append({"": value * n, **{f"/{name}": part * n for name, part in told.items()}})
        return {name: torch.stack([one[name] for one in terms]).sum() for name in terms[0]}


def _pieces(loss: KVLoss, n_batch: int) -> list[list[int]]:
    """Rules 1 and 2: by example, or all at once."""
    every = list(range(n_batch))
    return [every] if "reads" in loss.needs else [[row] for row in every]


def _by_example(
    each: Float[Tensor, " scored"], scored: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Sums by row; a scatter, which adds nothing up, so that a GPU gives the same digits each time."""
    return torch.zeros_like(scored, dtype=each.dtype).masked_scatter(scored, each).sum(-1)
