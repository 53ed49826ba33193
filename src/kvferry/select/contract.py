"""What every selector does: `plan(sight, budget) -> Plan`, one sequence at a time.

Masks apply in this order: slots that are present, then the scope, then how many, then the scores (Rule: what is out of
scope is never sent, however high it scores).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import BadSpec, EmptyContext, NotFinite
from kvferry.kv import Geometry, Need, Plan, Role
from kvferry.select.most import most
from kvferry.select.sight import Budget, Sight
from kvferry.spec import Method

Scope = Literal["all_context", "prompt", "instruction_only"]
"""Every slot; those without special tokens; text alone, without the template around it."""

_OUT_OF_SCOPE: dict[str, tuple[Role, ...]] = {
    "all_context": (),
    "prompt": (Role.SPECIAL,),
    "instruction_only": (Role.SPECIAL, Role.TEMPLATE),
}


@dataclass(frozen=True, repr=False)
class Selector(Method, ABC):
    """Decides what to send of one sequence."""

    needs: ClassVar[tuple[Need, ...]] = ()
    """Evidence that capture must record for it."""
    reads_question: ClassVar[bool] = False
    """It looks at `Sight.asked`: the receiver must send its question first."""
    scope: Scope = field(default="all_context", kw_only=True)

    @abstractmethod
    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        """The plan; with a budget one whose cost is within it.

        Raises `EmptyContext` for a scope without slots, `NotFinite` for scores that are NaN, `BudgetTooSmall` with
        the smallest cap that would do.
        """

    def fitted(self) -> tuple[str, ...]:
        """SHA-256 of what was fitted for it and lies in folders: that decides the plan too. Raises `FolderError`."""
        return ()

    def require_sender(self, geometry: Geometry) -> None:
        """Load now what lies in files, for this sender: a selector that has none needs nothing.

        Raises `FolderError` or `ForeignModel`, as `plan` would after everything was read.
        """

    def eligible(self, sight: Sight) -> Bool[Tensor, "layers slots"]:
        """The slots in scope, by layer; `EmptyContext` if there are none."""
        role = sight.kv.spans[0].role
        inside = torch.from_numpy(~np.isin(role, _OUT_OF_SCOPE[self.scope])).to(sight.kv.device)
        held = sight.kv.present[:, 0] & inside
        if not bool(held.any()):
            raise EmptyContext(f"scope {self.scope} holds no slot", cure="Choose a wider scope")
        return held


@dataclass(frozen=True, repr=False)
class TokenSelector(Selector):
    """Keeps the slots that score highest, the same ones in every layer or each layer its own.

    `proportion` of the slots in scope are kept, rounded up, `min_tokens` at least, all if there are fewer; a budget may
    leave room for fewer. `sinks` slots at the start are kept first of all. Equal scores: the earlier slot is kept.
    """

    proportion: float = field(default=1.0, kw_only=True)
    min_tokens: int = field(default=1, kw_only=True)
    sinks: int = field(default=0, kw_only=True)
    per_layer: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.proportion <= 1 or self.min_tokens < 1 or self.sinks < 0:
            what = (
                f"{self.name}(proportion={self.proportion}, min_tokens={self.min_tokens}, sinks={self.sinks})"
            )
            raise BadSpec(what, cure="proportion is in (0, 1], min_tokens 1 or more, sinks 0 or more")

    @abstractmethod
    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        """How much each layer wants each slot; only the order within a layer counts if layers choose on their own."""

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held = self.eligible(sight)
        ranks = self._ranks(sight, held)
        n_slots = int(held.any(0).sum())
        n_kept = min(max(int(np.ceil(self.proportion * n_slots - 1e-9)), self.min_tokens), n_slots)
        if budget is None:
            return _first(ranks, held, n_kept)
        return self._within(ranks, held, n_kept, budget)

    def _ranks(self, sight: Sight, held: Bool[Tensor, "layers slots"]) -> Int[Tensor, "layers slots"]:
        """The place of each slot in the order in which slots are kept, 0 first."""
        scores = self.score(sight).float()
        if bool((scores.isnan() & held).any()):
            layer, slot = (int(i) for i in (scores.isnan() & held).nonzero()[0])
            cure = "Check the model's dtype: fp16 overflows"
            raise NotFinite(f"the score of slot {slot} in layer {layer} is NaN", cure=cure)
        if not self.per_layer:
            scores = _shared(scores, held).expand_as(scores)
            held = held.any(0).expand_as(held)
        order = scores.masked_fill(~held, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        ranks = order.argsort(-1)
        first = held & (held.cumsum(-1) <= self.sinks)
        order = torch.where(first, ranks - ranks.shape[-1], ranks).sort(dim=-1, stable=True).indices
        return order.argsort(-1)

    def _within(self, ranks: Tensor, held: Bool[Tensor, "layers slots"], n_kept: int, budget: Budget) -> Plan:
        """The most slots, `n_kept` at most, that the budget has room for."""
        least = min(self.min_tokens, n_kept)
        budget.require(_first(ranks, held, least))
        return _first(ranks, held, most(least, n_kept, lambda n: budget.fits(_first(ranks, held, n))))


def _shared(scores: Float[Tensor, "layers slots"], held: Bool[Tensor, "layers slots"]) -> Tensor:
    """One score for all layers: the mean of theirs, each brought to mean 0 and deviation 1 over its own slots."""
    known = held & scores.isfinite()
    n = known.sum(-1, keepdim=True).clamp(min=1)
    kept = scores.masked_fill(~known, 0.0)
    mean = kept.sum(-1, keepdim=True) / n
    deviation = ((kept - mean).masked_fill(~known, 0.0).square().sum(-1, keepdim=True) / n).sqrt()
    standard = (kept - mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny)
    total = standard.masked_fill(~known, 0.0).sum(0) / known.sum(0).clamp(min=1)
    return total.masked_fill(~known.any(0), -torch.inf)


def _first(ranks: Tensor, held: Bool[Tensor, "layers slots"], n_kept: int) -> Plan:
    keep = (ranks < n_kept) & held
    return Plan(keep.to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))
