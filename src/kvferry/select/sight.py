"""What a selector may look at: one sequence, as its sender holds it before anything is sent."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import BudgetTooSmall, ShapeMismatch, UsageError
from kvferry.kv import KV, Cost, Evidence, Offer, Plan, Readout
from kvferry.metrics.attention import Scores


@dataclass(frozen=True)
class Asked:
    """What the sender's own queries were, when it read the question after the context: content space, by layer."""

    queries: tuple[Float[Tensor, "1 _queries new _dim"], ...]
    positions: Int[Tensor, "1 new"]
    """In the count of `Sight.read`."""


@dataclass(frozen=True)
class Sight:
    """One sequence: the slots that may be sent, and what was seen while it was read.

    `kv` holds the slots, on whichever token grid they travel; `read` the tokens as the sender read them, its own head
    and special tokens too, and `evidence` lies on those. `carried` says which tokens a slot carries.
    """

    kv: KV
    read: KV
    carried: Bool[Tensor, "slots tokens"]
    evidence: Evidence = field(default_factory=Evidence)
    scores: tuple[Scores, ...] = ()
    """How each layer turns q·k into the argument of its softmax."""
    asked: Asked | None = None
    readout: Readout | None = None
    base: KV | None = None
    """What the receiver holds of these slots itself, in its own geometry: an oracle, or what a first round brought."""

    def __post_init__(self) -> None:
        for kv in (self.kv, self.read):
            kv.require_space("content")
            if kv.n_batch != 1:
                raise ShapeMismatch(f"a batch of {kv.n_batch}", cure="Select from one sequence at a time")
        if tuple(self.carried.shape) != (self.kv.n_tokens, self.read.n_tokens):
            what = f"a map of {tuple(self.carried.shape)} for {self.kv.n_tokens} slots"
            raise ShapeMismatch(what, cure=f"Map {self.kv.n_tokens} slots to {self.read.n_tokens} tokens")

    def on_slots(self, of_tokens: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows slots"]:
        """For each slot the largest of the numbers of the tokens that it carries; -inf for one that carries none."""
        spread = of_tokens.unsqueeze(-2).masked_fill(~self.carried, -torch.inf)
        return spread.amax(-1)

    def require_asked(self) -> Asked:
        """The question's queries; `UsageError` where no question came."""
        if self.asked is None:
            cure = "Let the receiver send its question first (Sender.read(..., question=)), or choose another selector"
            raise UsageError("this selector looks at the question, and none came", cure=cure)
        return self.asked


def alone(kv: KV) -> Sight:
    """A sight of a cache without any evidence, every token a slot of its own."""
    return Sight(kv, kv, torch.eye(kv.n_tokens, dtype=torch.bool, device=kv.device))


@dataclass(frozen=True)
class Budget:
    """How many bytes there are, what a plan takes of them, and what the codec offers. Handed in by whoever encodes."""

    max_bytes: int
    cost: Cost
    offer: Offer | None = None

    def fits(self, plan: Plan) -> bool:
        return self.cost(plan) <= self.max_bytes

    def require(self, least: Plan) -> None:
        """Raise `BudgetTooSmall` unless the least plan that would do fits."""
        if (needed := self.cost(least)) > self.max_bytes:
            raise BudgetTooSmall(self.max_bytes, needed)
