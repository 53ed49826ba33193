"""Rotary position embedding as data (`RotarySpec`) and its application, pure torch, always in fp32.

Su et al., RoFormer (arXiv:2104.09864). A spec holds the inverse frequencies that the model really uses, so every
scaling rule (linear, llama3, yarn, proportional, partial, per layer type) is the same spec with other numbers. Only
rules that look at the length of the call (longrope, dynamic) need a `LongRule` beside it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LongRule:
    """How the frequencies change once a call is longer than `threshold` positions.

    `longrope` switches to `inv_freq` and `scaling`; `dynamic` raises the base with the call's length (NTK-aware):
    base * (factor * n / threshold - (factor - 1)) ** (dim / (dim - 2)).
    """

    kind: Literal["longrope", "dynamic"]
    threshold: int
    inv_freq: tuple[float, ...] = ()
    scaling: float = 1.0
    base: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class RotarySpec:
    """What one layer does to its keys: nothing (`style="none"`), or a rotation of the first `dim` channels.

    `half`: channel i turns with channel i + dim/2; `interleaved`: 2i with 2i + 1. `scaling` multiplies cos and sin
    (yarn, longrope). `sections` splits the frequencies over the position axes (M-RoPE), empty for one axis;
    `section_order` says whether sections lie one after the other or take turns.
    """

    style: Literal["none", "half", "interleaved"]
    dim: int = 0
    inv_freq: tuple[float, ...] = ()
    scaling: float = 1.0
    sections: tuple[int, ...] = ()
    section_order: Literal["blocks", "turns"] = "blocks"
    long: LongRule | None = None

    def for_call(self, call_length: int) -> "RotarySpec":
        """The spec without rule that holds in a call over `call_length` positions."""
        if self.long is None:
            return self
        plain = replace(self, long=None)
        if call_length <= self.long.threshold:
            return plain
        if self.long.kind == "longrope":
            return replace(plain, inv_freq=self.long.inv_freq, scaling=self.long.scaling)
        return replace(plain, inv_freq=_dynamic_inv_freq(self.long, self.dim, call_length))


NO_ROTATION = RotarySpec(style="none")
