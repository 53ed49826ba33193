"""Both models read the same texts; their tokens are paired by the bytes they stand for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from kvferry.align.features import flatten, with_neighbours
from kvferry.align.ridge import Sums
from kvferry.align.spans import overlaps
from kvferry.errors import UsageError
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Roundtrip
from kvferry.models.capture import capture
from kvferry.models.load import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Pairs:
    """Sums of token pairs, and how many text tokens each model needed for the same texts."""

    sums: Sums
    n_sender_tokens: int
    n_receiver_tokens: int

    @property
    def stride(self) -> float:
        """Receiver tokens per sender token."""
        return self.n_receiver_tokens / self.n_sender_tokens

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(
            self.sums + other.sums,
            self.n_sender_tokens + other.n_sender_tokens,
            self.n_receiver_tokens + other.n_receiver_tokens,
        )


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def collect(
    sender: Model,
    receiver: Model,
    texts: Sequence[str],
    roundtrips: Sequence[Roundtrip],
    *,
    neighbours: int = 1,
    batch_size: int = 32,
) -> Pairs:
    """Token pairs of all texts, the sender's side as each codec delivers it.

    Raises `UsageError` where no token of one model shares a byte with one of the other.
    """
    total: Pairs | None = None
    for batch in batches(texts, batch_size):
        part = _collect_batch(sender, receiver, batch, roundtrips, neighbours)
        total = part if total is None else total + part
    if total is None or total.sums.n == 0:
        raise UsageError("no token pairs", cure="Fit on texts that both tokenizers can read")
    return total


def _collect_batch(
    sender: Model, receiver: Model, texts: Sequence[str], roundtrips: Sequence[Roundtrip], neighbours: int
) -> Pairs:
    sent, held = (text_slots(capture(model, texts).kv) for model in (sender, receiver))
    targets, paired = _targets(sent, held)
    inputs = (with_neighbours(trip(sent), neighbours)[paired] for trip in roundtrips)
    parts = [Sums.of(x.cpu(), targets[paired].cpu()) for x in inputs]
    sums = parts[0]
    for part in parts[1:]:
        sums = sums + part
    return Pairs(sums, int(sent.present[0].sum()), int(held.present[0].sum()))


def _targets(sent: KV, held: KV) -> tuple[Float[Tensor, "batch tokens out"], Tensor]:
    """For each sender token the mean of the receiver's entries over its bytes, and whether there are any."""
    weights = overlaps(sent.spans, held.spans).to(held.device)
    weights = weights * sent.present.all(0).unsqueeze(-1)
    return weights @ flatten(held), weights.sum(-1) > 0.5
