"""The receiver's prompt: its own head, the slots that arrived, and what follows them, in one forward pass.

Masks go by position, so the slots may enter the cache first, and head and question are read together afterwards: the
head stands before the slots and does not see them, the question stands after and sees both.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.fuse.layout import relay_layout
from kvferry.kv import KV
from kvferry.models.load import Model
from kvferry.models.state import State, empty, inject, read_at
from kvferry.models.tokens import Tokens


def take_over(
    model: Model, kv: KV, stride: float, after: Tokens, *, keep: int = 1
) -> tuple[State, Float[Tensor, "batch keep vocab"]]:
    """Read `after` behind an aligned cache, laid out for `stride` receiver tokens per sender token.

    Returns the state, and the logits of the last `keep` tokens of `after` (0: of all). Differentiable in the cache.
    Raises what `inject` and `read` raise.
    """
    head, mask = model.heads(kv.n_batch), after.mask.to(model.device)
    n_head = head.ids.shape[1]
    layout = relay_layout(kv, n_head, stride)
    behind = layout.next_position.to(model.device).unsqueeze(-1) + mask.cumsum(-1) - 1
    before = torch.arange(n_head, device=model.device).expand(kv.n_batch, -1)
    state = empty(model, kv.n_batch, call_length=int(behind.max()) + 1)
    inject(state, kv, layout.positions, layout.next_position)
    tokens = Tokens(torch.cat([head.ids, after.ids], -1), torch.cat([head.mask, after.mask], -1), after.spans)
    logits = read_at(state, tokens, torch.cat([before, behind], -1), keep=keep)
    return state, logits if keep else logits[:, n_head:]
