"""What all arms of a pair stand on: the same test passages, and how the receiver does without any map."""

from dataclasses import dataclass

from kvferry.align.contract import Grid
from kvferry.lab.align.passages import Pair, Passage
from kvferry.lab.align.task import Batch, Nats, after_cache, after_text, batches_of
from kvferry.train.route import Route
from kvferry.train.scores import Judged

TEXTS = (16, 64, 128)


@dataclass(frozen=True)
class Ground:
    """A pair, its test passages, and nats per character with nothing, the whole text, and ends of it."""

    pair: Pair
    passages: list[Passage]
    nothing: Nats
    whole: Nats
    ends: dict[int, Nats]

    @property
    def gap(self) -> float:
        """What the prefix is worth to the receiver, in nats per character."""
        return float(self.nothing.mean() - self.whole.mean())


def ground_of(pair: Pair, n: int) -> Ground:
    """Over the first `n` test passages."""
    found, receiver = pair.passages("test", n), pair.receiver
    ends = {k: after_text(receiver, found, lambda passage, k=k: passage.prefix[-k:]) for k in TEXTS}
    nothing = after_text(receiver, found, lambda passage: "")
    return Ground(pair, found, nothing, after_text(receiver, found, lambda passage: passage.prefix), ends)


@dataclass(frozen=True)
class Plots:
    """The test passages as the sender holds them on a grid: whole, and with the tail kept back as text."""

    grid: Grid
    whole: list[Batch]
    without_tail: list[Batch]

    def nats(self, ground: Ground, judged: Judged, *, with_tail: bool) -> Nats:
        """Behind a map, with the tail as text or without."""
        batches = self.without_tail if with_tail else self.whole
        receiver = ground.pair.receiver
        return after_cache(
            receiver, batches, lambda batch: judged.arrive(batch.sent, batch.contexts), judged.stride
        )


def plots_of(ground: Ground, grid: Grid) -> Plots:
    """Read the test passages once."""
    pair, n = ground.pair, len(ground.passages)
    route = Route(pair.sender, pair.receiver, grid)
    whole, without = (batches_of(pair, route, "test", n, with_tail=tail) for tail in (False, True))
    return Plots(grid, whole, without)
