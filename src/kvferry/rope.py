"""Rotary position embedding as data (`RotarySpec`) and its application, pure torch, always in fp32.

Su et al., RoFormer (arXiv:2104.09864). A spec holds the inverse frequencies that the model really uses, so every
scaling rule (linear, llama3, yarn, proportional, partial, per layer type) is the same spec with other numbers. Only
rules that look at the length of the call (longrope, dynamic) need a `LongRule` beside it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.errors import BadSpec, ShapeMismatch


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

    def __post_init__(self) -> None:
        if len(self.inv_freq) * 2 != self.dim:
            raise BadSpec(
                f"{len(self.inv_freq)} frequencies turn {self.dim} channels", cure="Give one per pair"
            )
        if self.sections and sum(self.sections) != len(self.inv_freq):
            cure = f"They must add up to {len(self.inv_freq)} frequencies"
            raise BadSpec(f"sections {self.sections}", cure=cure)

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


def rotate(
    keys: Float[Tensor, "*rows batch heads tokens dim"],
    positions: Int[Tensor, "axes batch tokens"],
    spec: RotarySpec,
    call_length: int = 0,
) -> Float[Tensor, "*rows batch heads tokens dim"]:
    """Content keys to rotated keys at `positions`, in fp32. Differentiable; layers that share `spec` may be stacked.

    `call_length` is the number of positions of the call in which the keys will be read; only rules that look at it
    (`spec.long`) need it. One position axis serves every section. Raises `ShapeMismatch`.

    >>> spec = RotarySpec("half", dim=2, inv_freq=(1.0,))
    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[0]]]), spec)
    tensor([[[[1., 0.]]]])
    """
    plain = spec.for_call(call_length)
    return _turn(keys, positions, plain, sign=1.0, gain=plain.scaling)


def strip(
    keys: Float[Tensor, "*rows batch heads tokens dim"],
    positions: Int[Tensor, "axes batch tokens"],
    spec: RotarySpec,
    call_length: int = 0,
) -> Float[Tensor, "*rows batch heads tokens dim"]:
    """Rotated keys to content keys, in fp32: the exact inverse of `rotate` with the same arguments.

    `positions` and `call_length` are those that the keys were made at. Raises `ShapeMismatch`.

    >>> spec = RotarySpec("interleaved", dim=2, inv_freq=(0.5,), scaling=2.0)
    >>> keys, positions = torch.ones(1, 1, 1, 4), torch.tensor([[[7]]])
    >>> bool(strip(rotate(keys, positions, spec), positions, spec).allclose(keys))
    True
    """
    plain = spec.for_call(call_length)
    return _turn(keys, positions, plain, sign=-1.0, gain=1.0 / plain.scaling)


def _turn(
    keys: Float[Tensor, "*rows batch heads tokens dim"],
    positions: Int[Tensor, "axes batch tokens"],
    spec: RotarySpec,
    sign: float,
    gain: float,
) -> Float[Tensor, "*rows batch heads tokens dim"]:
    keys = keys.float()
    if spec.style == "none":
        return keys
    _check(keys, positions, spec)
    angles = _angles(positions, spec).unsqueeze(1)  # [batch, 1, tokens, dim / 2]
    cos, sin = angles.cos() * gain, angles.sin() * (sign * gain)
    turning, rest = keys[..., : spec.dim], keys[..., spec.dim :]
    first, second = _pairs(turning, spec)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.cat(turned, -1) if spec.style == "half" else torch.stack(turned, -1).flatten(-2)
    return torch.cat((joined, rest), -1)


def _pairs(
    turning: Float[Tensor, "*rows dim"], spec: RotarySpec
) -> tuple[Float[Tensor, "*rows pairs"], Float[Tensor, "*rows pairs"]]:
    if spec.style == "half":
        return turning[..., : spec.dim // 2], turning[..., spec.dim // 2 :]
    return turning[..., 0::2], turning[..., 1::2]


def _angles(
    positions: Int[Tensor, "axes batch tokens"], spec: RotarySpec
) -> Float[Tensor, "batch tokens pairs"]:
    """fp32 position times fp32 frequency, as transformers computes it, so that results agree to the last bits."""
    frequencies = _table(spec.inv_freq, positions.device)
    if len(positions) == 1:
        return positions[0].unsqueeze(-1).float() * frequencies
    axes = torch.tensor(_axis_of_pair(spec), device=positions.device)
    return positions[axes].permute(1, 2, 0).float() * frequencies


def _axis_of_pair(spec: RotarySpec) -> list[int]:
    """Which position axis turns each pair of channels.

    In turns, axis `a` owns every pair `a, a + n, a + 2n, ...` up to its section's length; axis 0 takes what is left.
    """
    if spec.section_order == "blocks":
        return [axis for axis, length in enumerate(spec.sections) for _ in range(length)]
    n_axes = len(spec.sections)
    turns = [(pair % n_axes, pair // n_axes) for pair in range(len(spec.inv_freq))]
    return [axis if turn < spec.sections[axis] else 0 for axis, turn in turns]


@lru_cache(maxsize=1024)
def _table(inv_freq: tuple[float, ...], device: torch.device) -> Float[Tensor, " pairs"]:
    # A tensor born in inference mode could never serve a training step later.
    with torch.inference_mode(False):
        return torch.tensor(inv_freq, dtype=torch.float32, device=device)


@lru_cache(maxsize=1024)
def _dynamic_inv_freq(rule: LongRule, dim: int, call_length: int) -> tuple[float, ...]:
    """NTK-aware frequencies of one call, operation by operation as transformers computes them."""
    stretch = rule.factor * torch.tensor(call_length) / rule.threshold - (rule.factor - 1)
    base = rule.base * stretch ** (dim / (dim - 2))
    return tuple((1.0 / base ** (torch.arange(0, dim, 2).float() / dim)).tolist())


def _check(keys: Tensor, positions: Tensor, spec: RotarySpec) -> None:
    want = keys.shape[-4], keys.shape[-2]
    if tuple(positions.shape[1:]) != want:
        cure = f"These keys need (axes, {want[0]}, {want[1]})"
        raise ShapeMismatch(f"positions of shape {tuple(positions.shape)}", cure=cure)
    if len(positions) not in (1, len(spec.sections)):
        cure = f"Give one axis, or one for each of the {len(spec.sections)} sections"
        raise ShapeMismatch(f"positions have {len(positions)} axes", cure=cure)
    if spec.dim > keys.shape[-1]:
        cure = "Use the spec of the layer that made the keys"
        raise ShapeMismatch(f"{spec.dim} channels turn, but keys have {keys.shape[-1]}", cure=cure)
