"""The one owner of positions: where the receiver's own tokens and the arriving slots stand.

    own head (BOS, template)  |  slots of the sender  |  question

Nobody else assigns positions. What a message says about the sender's positions is evidence: it keeps the order of the
tokens and the gaps where some were dropped.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.kv import KV, Role


@dataclass(frozen=True)
class Layout:
    """Receiver positions of the slots, and the position at which reading goes on, row by row."""

    positions: Int[Tensor, "batch tokens"]
    next_position: Int[Tensor, " batch"]


def text_slots(kv: KV) -> KV:
    """The cache without the sender's special and template tokens, positions counted from its first text token.

    The receiver has a head of its own; the sender's would stand in its way. Slots that no sequence needs are dropped,
    the others only marked absent, so that a batch keeps its shape.
    """
    is_text = torch.from_numpy(np.stack([spans.role == Role.TEXT for spans in kv.spans])).to(kv.device)
    last = torch.iinfo(kv.positions.dtype).max
    first = kv.positions[0].masked_fill(~is_text, last).min(-1, keepdim=True).values if kv.n_tokens else 0
    text = replace(kv, present=kv.present & is_text, positions=(kv.positions - first) * is_text)
    return text.take_tokens(text.present.any(dim=(0, 1)).nonzero().flatten())


def relay_layout(kv: KV, n_head: int, stride: float = 1.0) -> Layout:
    """Slots after a head of `n_head` tokens, `stride` receiver positions for each sender token.

    With one tokenizer the stride is 1 and every slot stands where the receiver's own token would. Otherwise a slot
    stands where its text would begin on average, so that distances keep the receiver's scale.
    Raises `UsageError` for a stride that is not positive.
    """
    if not 0 < stride < float("inf"):
        raise UsageError(
            f"stride is {stride}", cure="Give receiver tokens per sender token, a positive number"
        )
    used = kv.present.any(0)
    index = kv.positions[0].double() * used
    positions = n_head + (index * stride).floor().long()
    length = (
        ((index + used) * stride).ceil().long().amax(-1) if kv.n_tokens else torch.zeros(kv.n_batch).long()
    )
    return Layout(positions, n_head + length)
