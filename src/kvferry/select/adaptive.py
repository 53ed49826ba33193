"""How many slots: from what has changed, how rich the text is, and how many bytes there are."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import BadSpec, ShapeMismatch
from kvferry.kv import KV, Geometry, Plan
from kvferry.select.all import All
from kvferry.select.contract import Selector, TokenSelector
from kvferry.select.sight import Budget, Sight
from kvferry.select.table import SELECTORS

_SAME = 1e-2
"""Relative difference up to which a slot counts as unchanged: the noise of batching and dtypes."""


@dataclass(frozen=True, repr=False)
class Adaptive(Selector):
    """Lets `inner` choose which slots, and decides how many: its own proportion, halved to doubled by each reason.

    `change` is how much of the text is new since the last message: `since(now, before)` measures it, and without a
    message before all is new. How rich the text is, is measured on the sequence in the hand. A budget bounds both.

    >>> Adaptive("knorm(proportion=0.2)", change=0.1).brief()
    "adaptive(inner='knorm(proportion=0.2)', change=0.1)"
    """

    name: ClassVar[str] = "adaptive"
    inner: str = "back(proportion=0.25)"
    change: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.change <= 1:
            raise BadSpec(f"adaptive(change={self.change})", cure="change is in [0, 1]")
        inner = self._selector()
        # What it looks at is what the selector inside looks at.
        object.__setattr__(self, "needs", inner.needs)
        object.__setattr__(self, "reads_question", inner.reads_question)

    def since(self, now: Sight, before: Sight) -> "Adaptive":
        """This policy for a message after another one."""
        return replace(self, change=content_change(now.kv, before.kv))

    def fitted(self) -> tuple[str, ...]:
        return self._selector().fitted()

    def require_sender(self, geometry: Geometry) -> None:
        self._selector().require_sender(geometry)

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        sight.kv.require_finite()
        everything = All(scope=self.scope).plan(sight)
        inner = replace(self._selector(), scope=self.scope)
        wanted = share(inner.proportion, self.change, richness(sight.kv), room(everything, budget))
        return replace(inner, proportion=wanted).plan(sight, budget)

    def _selector(self) -> TokenSelector:
        inner = SELECTORS.parse(self.inner)
        if not isinstance(inner, TokenSelector):
            raise BadSpec(f"adaptive(inner={self.inner})", cure="Name a selector that has a proportion")
        return inner


def share(proportion: float, change: float, richness: float, room: float) -> float:
    """The proportion of slots to send, no more than there is room for.

    `proportion` is doubled where all is new and halved where nothing is; likewise for how rich the text is.

    >>> share(0.2, change=1.0, richness=0.5, room=1.0), share(0.2, 0.0, 0.5, 1.0), share(0.2, 1.0, 1.0, 0.3)
    (0.4, 0.1, 0.3)
    """
    return min(proportion * 2 ** (2 * change - 1) * 2 ** (2 * richness - 1), room, 1.0)


def content_change(now: KV, before: KV) -> float:
    """The share of slots that differ from the slot at their place in `before`, in keys or values of any layer."""
    if now.geometry != before.geometry:
        raise ShapeMismatch("caches of two models", cure="Compare two messages of one sender")
    n_both = min(now.n_tokens, before.n_tokens)
    same = torch.ones(n_both, dtype=torch.bool, device=now.device)
    for layer in range(now.geometry.n_layers):
        for new, old in zip(now.layer(layer), before.layer(layer), strict=True):
            same &= _alike(new[0, :, :n_both].float(), old[0, :, :n_both].float())
    return 1 - int(same.sum()) / max(now.n_tokens, 1)


def _alike(
    new: Float[Tensor, "heads slots dim"], old: Float[Tensor, "heads slots dim"]
) -> Bool[Tensor, " slots"]:
    return (new - old).square().sum((0, 2)).sqrt() <= _SAME * new.square().sum((0, 2)).sqrt()


def richness(kv: KV) -> float:
    """How many directions the values use, of those that they could: effective rank over the largest, mean over layers.

    The effective rank is exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
    """
    layers = [
        kv.layer(layer)[1][0].float().transpose(0, 1).flatten(1) for layer in range(kv.geometry.n_layers)
    ]
    return sum(map(_relative_rank, layers)) / len(layers)


def _relative_rank(rows: Float[Tensor, "slots dim"]) -> float:
    smaller = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
    sizes = torch.linalg.eigvalsh(smaller.double()).clamp(min=0).sqrt()
    shares = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp()) / len(sizes)


def room(everything: Plan, budget: Budget | None) -> float:
    """The share of what everything in scope would cost that there are bytes for; 1 without a budget."""
    return 1.0 if budget is None else min(budget.max_bytes / budget.cost(everything), 1.0)
