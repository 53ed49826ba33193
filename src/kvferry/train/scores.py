"""Held-out quality of a map: nats per scored token and answers right, example by example, with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry.align.contract import Aligner
from kvferry.align.features import flatten, unflatten
from kvferry.codec import Codec, roundtrip
from kvferry.kv import KV, Roundtrip
from kvferry.metrics.paired import Interval, bootstrap_mean, wilson
from kvferry.train.answer_loss import Scores, answer_scores, continuations
from kvferry.train.examples import Example
from kvferry.train.paired import batches
from kvferry.train.route import Route

_BATCH = 32


@dataclass(frozen=True)
class Score:
    """Quality under one codec, or of one control. `nats` are each example's nats per scored token."""

    name: str
    loss: float
    accuracy: float
    n_pieces: int
    nats: NDArray[np.float64]

    @property
    def loss_ci95(self) -> Interval:
        """Of the mean over examples."""
        return bootstrap_mean(self.nats)

    @property
    def accuracy_ci95(self) -> Interval:
        return wilson(round(self.accuracy * self.n_pieces), self.n_pieces)


Arrive = Callable[[KV, Sequence[str]], KV]
"""What the sender holds of some contexts, and the contexts: to a cache of the receiver's."""


@dataclass(frozen=True)
class Judged:
    """A way from the sender's cache to the receiver's, and the receiver's positions per slot."""

    name: str
    arrive: Arrive
    stride: float


def through(name: str, aligner: Aligner, trip: Roundtrip | None = None) -> Judged:
    """A map, behind what a cache may go through before it."""
    return Judged(name, lambda kv, _: aligner(kv if trip is None else trip(kv)), aligner.contract.stride)


def behind(aligner: Aligner, codecs: Sequence[Codec]) -> list[Judged]:
    """A map behind each of the codecs."""
    return [through(repr(codec), aligner, partial(roundtrip, codec)) for codec in codecs]


@torch.no_grad()
def score(route: Route, judged: Sequence[Judged], examples: Sequence[Example]) -> list[Score]:
    """Held-out quality of each; every text is read once."""
    tallies = [_Tally() for _ in judged]
    for batch in batches(examples, _BATCH):
        contexts = [example.context for example in batch]
        sent = route.sent(contexts)
        after = continuations(route.receiver, batch)
        for one, tally in zip(judged, tallies, strict=True):
            arrived = one.arrive(sent, contexts)
            tally.add(answer_scores(route.receiver, arrived, after, one.stride))
    return [tally.score(one.name) for one, tally in zip(judged, tallies, strict=True)]


def mean_loss(scores: Sequence[Score]) -> float:
    """Of several codecs."""
    return sum(one.loss for one in scores) / len(scores)


@dataclass
class _Tally:
    nats: float = 0.0
    n_tokens: int = 0
    n_pieces: int = 0
    n_right: int = 0
    each: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, got: Scores) -> None:
        self.nats, self.n_tokens = self.nats + float(got.nats), self.n_tokens + got.n_tokens
        self.n_pieces, self.n_right = self.n_pieces + got.n_pieces, self.n_right + got.n_right
        self.each.append(got.by_example.double().cpu().numpy())

    def score(self, name: str) -> Score:
        loss, accuracy = self.nats / self.n_tokens, self.n_right / self.n_pieces
        return Score(name, loss, accuracy, self.n_pieces, np.concatenate(self.each))


def mean_cache(kv: KV) -> KV:
    """Each present slot holds the mean over all present slots of the batch."""
    held = kv.present.all(0).unsqueeze(-1)
    features = flatten(kv)
    mean = (features * held).sum((0, 1), keepdim=True) / held.sum()
    return kv.with_groups(unflatten(mean.expand_as(features), kv.geometry))


def other_contexts(kv: KV) -> KV:
    """Each row gets the cache of the row before: what any context is worth, whatever it says.

    It is cut where the row's own cache ends, so that what follows has room where it had before.
    """
    other = kv.take_batch([row - 1 for row in range(kv.n_batch)])
    end = (kv.positions[0] * kv.present.any(0)).amax(-1, keepdim=True)
    return replace(other, present=other.present & (other.positions[0] <= end))
