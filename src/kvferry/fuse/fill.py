"""What stands where nothing came: nothing, as it should be, or zeros, to show what they do."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.kv import KV, Group, Role, Spans, stack

Fill = Literal["absent", "zeros"]


def with_zeros(kv: KV) -> KV:
    """A slot for each position up to the last that came; zeros where a layer did not get it, and they are attended to.

    A key of zeros takes as large a share of attention as any key of score 0, and its value gives nothing for it. For
    comparison only: absent slots are masked. Raises `UsageError` where two slots stand at one position.
    """
    return stack([_filled(one) for one in kv.sequences()])


def _filled(one: KV) -> KV:
    place = one.positions[0, 0].long()
    n_slots = int(place.max()) + 1 if one.n_tokens else 0
    if len(place.unique()) < len(place):
        cure = "Zeros fill gaps on the sender's own tokens only"
        raise UsageError("two slots stand at one position", cure=cure)
    present = one.present.new_ones(*one.present.shape[:2], n_slots)
    nothing = np.zeros(n_slots, np.int32)
    return replace(
        one,
        groups=tuple(_spread(group, one, place, n_slots) for group in one.groups),
        present=present,
        positions=torch.arange(n_slots, device=one.device).expand(len(one.positions), 1, -1),
        spans=(Spans(nothing, nothing.copy(), nothing.copy(), np.full(n_slots, Role.TEXT, np.uint8)),),
    )


def _spread(group: Group, one: KV, place: Int[Tensor, " tokens"], n_slots: int) -> Group:
    held = one.present[list(group.layers)][:, :, None, :, None]
    parts = []
    for numbers in (group.keys, group.values):
        wide = numbers.new_zeros(*numbers.shape[:3], n_slots, numbers.shape[-1])
        wide[..., place, :] = numbers * held
        parts.append(wide)
    return Group(group.layers, parts[0], parts[1])
