"""The receiver's own side of a training: the entries that a mapped cache is held against, and their moments."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvferry.align.features import as_receiver
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV
from kvferry.metrics.attention import Scores
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.tokens import Tokens
from kvferry.train.cases import asked, content_queries
from kvferry.train.losses.base import Reads
from kvferry.train.losses.moments import CacheMoments, moments_of
from kvferry.train.paired import batches, targets

_BATCH = 32


@dataclass(frozen=True)
class Compared:
    """A mapped cache, and the receiver's own entries on its slots. What either side lacks is absent in both."""

    mapped: KV
    own: KV
    reads: Reads | None = None
    """Of what is read behind the slots; both caches then stand where the receiver lays them out."""

    def take(self, rows: list[int]) -> tuple[KV, KV]:
        """Both caches of some sequences."""
        return self.mapped.take_batch(rows), self.own.take_batch(rows)


@torch.no_grad()
def compared(receiver: Model, mapped: KV, contexts: Sequence[str]) -> Compared:
    """An aligned cache beside what the receiver holds of the same texts: the mean entry over each slot's bytes.

    No gradient reaches that one; those of `mapped` stay. Raises what `capture` raises.
    """
    # An autocast would round the target in the product with the overlaps.
    with torch.autocast(receiver.device.type, enabled=False):
        entries, paired = targets(mapped, text_slots(capture(receiver, contexts).kv))
    present = mapped.present & paired.to(mapped.device)
    own = as_receiver(mapped, entries.to(mapped.device), receiver.geometry)
    return Compared(replace(mapped, present=present), replace(own, present=present))


@torch.no_grad()
def with_reads(
    found: Compared,
    receiver: Model,
    contexts: Sequence[str],
    after: Tokens,
    stride: float,
    scores: tuple[Scores, ...],
) -> Compared:
    """The same slots where the receiver lays them out, and its queries of `after`, read behind the texts themselves."""
    content = content_queries(receiver, contexts, after)
    laid = asked(receiver, found.mapped, stride, content, after.mask.to(receiver.device))
    own = replace(found.own, positions=laid.kv.positions, call_length=laid.kv.call_length)
    return Compared(laid.kv, own, Reads(laid.queries, laid.positions, laid.mask, scores))


def own_moments(receiver: Model, texts: Sequence[str]) -> CacheMoments:
    """Moments of the receiver's own entries for some texts, a few of which are held at a time."""
    return moments_of(text_slots(capture(receiver, batch).kv) for batch in batches(texts, _BATCH))
