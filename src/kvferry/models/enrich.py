"""A receiver that has read a prompt itself, and what others made of the same prompt added to its cache.

The prompt is read up to its last token; the residuals are added; reading goes on from there. So the receiver's own
reading never waits for the link, and where nothing is added its answer is to the bit what it would have been.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.fuse.merge import Conflict
from kvferry.fuse.residual import Contribution, enriched
from kvferry.kv import KV, Spans
from kvferry.models.load import Model
from kvferry.models.state import State, empty, held, put, read
from kvferry.models.tokens import Tokens


def enrich(
    model: Model,
    prompt: Tokens,
    after: Tokens,
    senders: Sequence[Contribution],
    *,
    conflict: Conflict = "sum",
    keep: int = 1,
) -> tuple[State, Float[Tensor, "batch keep vocab"]]:
    """Read `prompt`, add what each sender's fuser makes of its cache, read `after` (see `all_but_last`).

    Slot t of an arrived cache stands for token t of `prompt`; slots of padding, and of tokens the sender lacks, are
    absent. Returns the state, and the logits of the last `keep` tokens of `after` (0: of all). Differentiable in the
    fusers, not in the model. Raises what `read` and the fusers raise.
    """
    return go_on(read_prompt(model, prompt, after), after, senders, conflict=conflict, keep=keep)


@dataclass(frozen=True)
class Prompted:
    """A prompt that a receiver has read, to be gone on from as often as wanted."""

    state: State
    spans: tuple[Spans, ...]

    @property
    def own(self) -> KV:
        """The receiver's cache of the prompt, keys rotated."""
        return held(self.state, self.spans)


@torch.no_grad()
def read_prompt(model: Model, prompt: Tokens, after: Tokens) -> Prompted:
    """The first half of `enrich`; of `after` only the length counts. Raises what `read` raises."""
    n_tokens = int((prompt.lengths + after.lengths).max())
    state = empty(model, len(prompt.ids), call_length=n_tokens)
    read(state, prompt)
    return Prompted(state, prompt.spans)


def go_on(
    prompted: Prompted,
    after: Tokens,
    senders: Sequence[Contribution],
    *,
    conflict: Conflict = "sum",
    keep: int = 1,
) -> tuple[State, Float[Tensor, "batch keep vocab"]]:
    """The second half of `enrich`. What it is given stays as it is."""
    state = replace(prompted.state)
    put(state, enriched(prompted.own, senders, conflict))
    return state, read(state, after, keep=keep)


def all_but_last(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """A left-padded prompt in two: all tokens but the last of each row, and the last.

    For training, join the answer to the second (`models.tokens.join`).
    """
    return _columns(tokens, slice(None, -1)), _columns(tokens, slice(-1, None))


def _columns(tokens: Tokens, which: slice) -> Tokens:
    chosen = np.arange(tokens.ids.shape[1])[which]
    return Tokens(
        tokens.ids[:, which], tokens.mask[:, which], tuple(one.take(chosen) for one in tokens.spans)
    )
