"""Which token of one model stands for which bytes of another's: overlap of byte spans, many to many."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from kvferry.kv import Role, Spans


def overlap(sender: Spans, receiver: Spans) -> NDArray[np.float32]:
    """Weights `[sender tokens, receiver tokens]`: the share of a sender token's bytes that each receiver token covers.

    Rows of text tokens sum to one where the receiver covers the text; rows of other tokens are zero. With equal
    tokenizers this is the identity. Tokens correspond by bytes only, never by decoding one and encoding it again.
    """
    first = np.maximum(sender.start[:, None], receiver.start[None, :])
    last = np.minimum(sender.end[:, None], receiver.end[None, :])
    common = np.clip(last - first, 0, None).astype(np.float32)
    common *= (sender.role == Role.TEXT)[:, None] & (receiver.role == Role.TEXT)[None, :]
    common *= sender.part[:, None] == receiver.part[None, :]
    total = common.sum(1, keepdims=True)
    return np.divide(common, total, out=np.zeros_like(common), where=total > 0)


def overlaps(
    sender: tuple[Spans, ...], receiver: tuple[Spans, ...]
) -> Float[Tensor, "batch sender receiver"]:
    """`overlap` for a padded batch."""
    return torch.stack(
        [torch.from_numpy(overlap(one, two)) for one, two in zip(sender, receiver, strict=True)]
    )
