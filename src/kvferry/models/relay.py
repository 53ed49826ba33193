"""The receiver's prompt up to the question: its own head, then the slots that arrived."""

from kvferry.fuse.layout import relay_layout
from kvferry.kv import KV
from kvferry.models.load import Model
from kvferry.models.state import State, empty, inject, read


def take_over(model: Model, kv: KV, stride: float, *, n_after: int) -> State:
    """A state that holds head and slots, as laid out for `stride` receiver tokens per sender token.

    `n_after` is how many tokens will follow: models whose rotary frequencies depend on the length of the prompt need to
    know. Differentiable in the cache. Raises what `inject` raises.
    """
    head = model.heads(kv.n_batch)
    layout = relay_layout(kv, head.ids.shape[1], stride)
    state = empty(model, kv.n_batch, call_length=int(layout.next_position.max()) + n_after)
    if head.ids.shape[1]:
        read(state, head)
    inject(state, kv, layout.positions, layout.next_position)
    return state
