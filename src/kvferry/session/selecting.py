"""From texts to what selectors look at, and from a sight to the message that a selector and a codec make of it."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kvferry.align.receiver_grid import on_receiver_grid
from kvferry.align.spans import shared_bytes
from kvferry.codec import Codec
from kvferry.codec.offer import Offering
from kvferry.errors import UsageError
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Need, Plan, Readout, Role
from kvferry.models.capture import Captured, capture
from kvferry.models.load import Model
from kvferry.models.scores import scores_of
from kvferry.models.tokenizer import Tokenizer
from kvferry.models.tokens import join
from kvferry.select.allocation import Allocation
from kvferry.select.contract import Selector
from kvferry.select.graded import Graded
from kvferry.select.sight import Asked, Budget, Sight
from kvferry.session.message import Message, message_of
from kvferry.wire import Frame


def look(
    model: Model,
    texts: Sequence[str],
    needs: Collection[Need] = (),
    *,
    onto: Tokenizer | None = None,
    questions: Sequence[str] | None = None,
    readout: Readout | None = None,
) -> list[Sight]:
    """Read contexts in one prefill: what may be sent of each, and the evidence that selectors need.

    With `questions` the sender reads each after its context too, for selectors that look at it; what is sent and all
    other evidence are those of the context alone. Raises `EmptyContext`, `ContextTooLong`.
    """
    seen = capture(model, texts, needs)
    scores = scores_of(model) if needs or questions is not None else ()
    sights = [_sight(seen, row, onto, text) for row, text in enumerate(texts)]
    asked = [None] * len(texts) if questions is None else _asked(model, texts, questions)
    return [
        replace(sight, scores=scores, asked=question, readout=readout)
        for sight, question in zip(sights, asked, strict=True)
    ]


def encode_sight(codec: Codec, selector: Selector, sight: Sight, max_bytes: int | None = None) -> Message:
    """The message that a selector and a codec make of one sequence, within `max_bytes`.

    Raises `BudgetTooSmall` with the smallest cap that would do, and what the selector and the codec raise.
    """
    return message_of(frame_of(codec, selector, sight, max_bytes))


def frame_of(codec: Codec, selector: Selector, sight: Sight, max_bytes: int | None = None) -> Frame:
    """The frame of that message, not packed yet."""
    return codec.encode(sight.kv, plan_of(codec, selector, sight, max_bytes), max_bytes)


def require_pairing(codec: Codec, selector: Selector) -> None:
    """Raise `UsageError` for a selector that chooses precision classes which the codec does not have."""
    if isinstance(selector, Graded):
        selector.require_codec(codec)
    if isinstance(selector, Allocation) and not isinstance(codec, Offering):
        cure = "Use a codec with precision classes (ecsq, mixed), or a selector of tokens"
        raise UsageError(f"{codec.brief()} has no precision classes for {selector.brief()}", cure=cure)


def plan_of(codec: Codec, selector: Selector, sight: Sight, max_bytes: int | None = None) -> Plan:
    """What a selector would have this codec send. Raises what `require_pairing` and the selector raise."""
    require_pairing(codec, selector)
    budget = None if max_bytes is None else _budget(codec, sight.kv, max_bytes)
    return selector.plan(sight, budget)


def _budget(codec: Codec, kv: KV, max_bytes: int) -> Budget:
    def cost(plan: Plan) -> int:
        return codec.smallest(kv, plan)

    offer = (lambda: codec.menu(kv, max_bytes)) if isinstance(codec, Offering) else None
    return Budget(max_bytes, cost, offer)


def _sight(seen: Captured, row: int, onto: Tokenizer | None, text: str) -> Sight:
    whole = seen.kv.take_batch([row])
    held = whole.present[0, 0].nonzero().flatten()
    read = whole.take_tokens(held)
    own = text_slots(read)
    kv = own if onto is None else on_receiver_grid(own, onto.spans([text]))
    return Sight(kv, read, _carried(kv, own, read), seen.evidence.sequence(row, held))


def _carried(kv: KV, own: KV, read: KV) -> Bool[Tensor, "slots tokens"]:
    """Which tokens each slot carries: one each on the sender's grid, those that share its bytes on another."""
    text = torch.from_numpy(np.flatnonzero(read.spans[0].role == Role.TEXT)).to(read.device)
    one_each = torch.zeros(own.n_tokens, read.n_tokens, dtype=torch.bool, device=read.device)
    one_each[torch.arange(own.n_tokens, device=read.device), text] = True
    if kv is own:
        return one_each
    found = shared_bytes(kv.spans[0], own.spans[0])
    pooled = torch.zeros(kv.n_tokens, own.n_tokens, device=read.device)
    pooled[torch.from_numpy(found.rows), torch.from_numpy(found.columns)] = 1.0
    return pooled @ one_each.float() > 0


def _asked(model: Model, texts: Sequence[str], questions: Sequence[str]) -> list[Asked]:
    """The queries of each question, read after its context."""
    if len(questions) != len(texts):
        raise UsageError(f"{len(questions)} questions on {len(texts)} contexts", cure="Ask one of each")
    after = model.questions([model.prompt.question(question) for question in questions])
    seen = capture(model, join(model.contexts(list(texts)), after), ("queries_content",))
    found = []
    for row, n_asked in enumerate(after.lengths.tolist()):
        tokens = seen.kv.present[0, row].nonzero().flatten()[-n_asked:]
        queries = seen.evidence.sequence(row, tokens).queries_content
        found.append(Asked(queries, seen.kv.positions[0, row : row + 1, tokens]))
    return found
