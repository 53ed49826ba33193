"""Both models read the same texts; their tokens are paired by the bytes they stand for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.align.features import flatten, with_neighbours
from kvferry.align.receiver_grid import N_CLASSES, classes_of
from kvferry.align.ridge import Sums
from kvferry.align.spans import overlaps
from kvferry.align.token_means import TokenMeans
from kvferry.align.token_table import first_layer
from kvferry.errors import UsageError
from kvferry.kv import KV, Roundtrip
from kvferry.train.route import Route

T = TypeVar("T")


@dataclass
class Pairs:
    """Sums of token pairs, over `neighbours` sender tokens each, and means of the entries of each token text.

    `classes` has the sums of each overlap class on the receiver's grid, else of all pairs. Tokens are counted once,
    however many codecs there are.
    """

    neighbours: int
    classes: list[Sums] = field(default_factory=list)
    tokens: TokenMeans = field(default_factory=TokenMeans)
    n_sent: int = 0
    n_held: int = 0

    @property
    def sums(self) -> Sums:
        """Of all classes together."""
        return sum(self.classes[1:], self.classes[0])

    @property
    def stride(self) -> float:
        """Receiver tokens per token that is sent."""
        return self.n_held / self.n_sent

    def narrowed(self, neighbours: int) -> "Pairs":
        """The same pairs, with fewer sender tokens each."""
        n_features = len(self.sums.x) // self.neighbours * neighbours
        classes = [_first(sums, n_features) for sums in self.classes]
        return replace(self, neighbours=neighbours, classes=classes)

    def add(self, sums: Sequence[Sums]) -> None:
        """Add the sums of each class."""
        self.classes = (
            [a + b for a, b in zip(self.classes, sums, strict=True)] if self.classes else list(sums)
        )


def _first(sums: Sums, n: int) -> Sums:
    return Sums(sums.n, sums.x[:n], sums.y, sums.xx[:n, :n], sums.xy[:n], sums.yy)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def collect(
    route: Route,
    texts: Sequence[str],
    roundtrips: Sequence[Roundtrip],
    *,
    neighbours: int = 1,
    batch_size: int = 32,
) -> Pairs:
    """Token pairs of all texts, the sender's side as each codec delivers it. Memory does not grow with the texts.

    Raises `UsageError` where no token of one model shares a byte with one of the other.
    """
    pairs = Pairs(neighbours)
    for batch in batches(texts, batch_size):
        _add_batch(pairs, route, batch, roundtrips)
    if not pairs.classes or pairs.sums.n == 0:
        raise UsageError("no token pairs", cure="Fit on texts that both tokenizers can read")
    return pairs


def _add_batch(pairs: Pairs, route: Route, texts: Sequence[str], roundtrips: Sequence[Roundtrip]) -> None:
    sent, held = route.sent(texts), route.held(texts)
    entries, paired = targets(sent, held)
    classes = classes_of(sent) if route.grid == "receiver" else None
    for trip in roundtrips:
        pairs.add(_sums(with_neighbours(trip(sent), pairs.neighbours), entries, paired, classes))
    told = [text for row in token_texts(sent, texts) for text in row]
    known = list(compress(told, paired.flatten().tolist()))
    pairs.tokens.add(known, first_layer(sent)[paired], entries[paired])
    pairs.n_sent += int(sent.present[0].sum())
    pairs.n_held += int(held.present[0].sum())


def targets(sent: KV, held: KV) -> tuple[Float[Tensor, "batch tokens out"], Bool[Tensor, "batch tokens"]]:
    """For each sent token the mean of the receiver's entries over its bytes, and whether there are any."""
    weights = overlaps(sent.spans, held.spans).to(held.device)
    weights = weights * sent.present.all(0).unsqueeze(-1)
    return weights @ flatten(held), weights.sum(-1) > 0.5


def token_texts(sent: KV, texts: Sequence[str]) -> list[list[bytes]]:
    """The bytes that each token stands for, row by row; none for padding."""
    return [
        [content[start:end] for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]
        for content, spans in zip((text.encode() for text in texts), sent.spans, strict=True)
    ]


def _sums(
    wide: Float[Tensor, "batch tokens features"],
    entries: Float[Tensor, "batch tokens out"],
    paired: Bool[Tensor, "batch tokens"],
    classes: Tensor | None,
) -> list[Sums]:
    if classes is None:
        return [_of(wide, entries, paired)]
    return [_of(wide, entries, paired & (classes == index)) for index in range(N_CLASSES)]


def _of(wide: Tensor, entries: Tensor, which: Bool[Tensor, "batch tokens"]) -> Sums:
    return Sums.of(wide[which].cpu(), entries[which].cpu())
