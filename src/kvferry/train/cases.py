"""Texts as a receiver meets them behind an aligner: the mapped cache clean and coded, its own, and its real queries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.align.contract import Aligner
from kvferry.codec import Codec, roundtrip
from kvferry.fuse.layout import relay_layout
from kvferry.kv import KV
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.tokens import Tokens, join
from kvferry.rope import rotate
from kvferry.train.answer_loss import continuations
from kvferry.train.examples import Example
from kvferry.train.paired import batches
from kvferry.train.route import Route

_BATCH = 8


@dataclass(frozen=True)
class Asked:
    """A cache at the receiver's positions, and by layer the rotated queries of what is read right behind it."""

    kv: KV
    queries: tuple[Float[Tensor, "batch queries new dim"], ...]
    positions: Int[Tensor, "batch new"]
    mask: Bool[Tensor, "batch new"]


@dataclass(frozen=True)
class Case:
    """One batch of texts. `sent` is what the sender read, `coded` the same after the codec."""

    sent: KV
    coded: KV
    mapped: Asked
    mapped_coded: Asked
    own: Asked


@dataclass(frozen=True)
class Way:
    """From a sender over a codec and an aligner to a receiver."""

    sender: Model
    receiver: Model
    aligner: Aligner
    codec: Codec

    def cases(self, examples: Sequence[Example]) -> Iterator[Case]:
        """The examples, a few at a time."""
        for batch in batches(examples, _BATCH):
            with torch.no_grad():
                yield self._case(batch)

    def _case(self, batch: Sequence[Example]) -> Case:
        contexts, after = [example.context for example in batch], continuations(self.receiver, batch).tokens
        route = Route(self.sender, self.receiver, self.aligner.contract.grid)
        sent, held = route.sent(contexts), route.held(contexts)
        coded = roundtrip(self.codec, sent)
        content, mask = content_queries(self.receiver, contexts, after), after.mask.to(self.receiver.device)
        stride = self.aligner.contract.stride
        mapped, mapped_coded = (
            asked(self.receiver, self.aligner(kv), stride, content, mask) for kv in (sent, coded)
        )
        return Case(sent, coded, mapped, mapped_coded, asked(self.receiver, held, 1.0, content, mask))


def content_queries(
    receiver: Model, contexts: Sequence[str], after: Tokens
) -> tuple[Float[Tensor, "batch queries new dim"], ...]:
    """By layer, the receiver's queries, without rotation, where it reads `after` behind contexts that it has read."""
    whole = capture(receiver, join(receiver.contexts(list(contexts)), after), ("queries_content",))
    return tuple(layer[:, :, -after.ids.shape[1] :] for layer in whole.evidence.queries_content)


def asked(
    receiver: Model,
    kv: KV,
    stride: float,
    content: tuple[Float[Tensor, "batch queries new dim"], ...],
    mask: Bool[Tensor, "batch new"],
) -> Asked:
    """Lay the slots out as the receiver would, and turn its queries to where they then stand."""
    layout = relay_layout(kv, receiver.head.ids.shape[1], stride)
    positions = (layout.next_position.unsqueeze(-1) + mask.cumsum(-1) - 1).clamp(min=0)
    call_length = int(positions.max()) + 1
    queries = tuple(
        rotate(states, positions.unsqueeze(0), layer.rotary, call_length)
        for states, layer in zip(content, receiver.geometry.layers, strict=True)
    )
    laid_out = replace(kv, positions=layout.positions.unsqueeze(0), call_length=call_length)
    return Asked(laid_out, queries, positions, mask)
