"""Sending at a rate, as something to differentiate: each number as the test channel of a Gaussian would deliver it.

At a step of s, a number of variance v keeps v / (v + s**2 / 12) of its distance from the mean, and noise makes up the
rest; it takes half log2(1 + 12 v / s**2) bits (Cover & Thomas, chapter 10). A step that is coarser than the number
tells nothing, and costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.codec.offer import Offering
from kvferry.errors import UsageError
from kvferry.kv import KV, Group

_HALVINGS = 18
_OCTAVES = 14.0
_STEP = 0.05

Octaves = Float[Tensor, "layers 2 batch tokens"]


@dataclass(frozen=True)
class Channels:
    """Of the keys and of the values of each layer: means, variances, and squared errors of a step of one unit."""

    mean: tuple[tuple[Tensor, Tensor], ...]
    variance: tuple[tuple[Tensor, Tensor], ...]
    unit: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, kv: KV, codec: Offering) -> "Channels":
        """From some caches, and from the steps that a codec takes for them."""
        mean, variance = [], []
        for layer in range(kv.geometry.n_layers):
            held = kv.present[layer]
            parts = [part.float().transpose(1, 2)[held] for part in kv.layer(layer)]
            mean.append((parts[0].mean(0).unsqueeze(1), parts[1].mean(0).unsqueeze(1)))
            variance.append((_variance(parts[0]), _variance(parts[1])))
        units = [codec.menu(one).units for one in kv.sequences()]
        if not all(units):
            raise UsageError(f"{codec!r} has no steps", cure="Fit under ecsq, with or without a profile")
        unit = [_mean_square([one[layer] for one in units]) for layer in range(kv.geometry.n_layers)]
        return cls(tuple(mean), tuple(variance), tuple(unit))

    def bits(self, octaves: Octaves) -> Float[Tensor, "layers 2 batch tokens"]:
        """What each slot takes with steps of 2**octaves units."""
        return torch.stack([self._layer_bits(layer, both) for layer, both in enumerate(octaves)])

    def _layer_bits(self, layer: int, octaves: Tensor) -> Float[Tensor, "2 batch tokens"]:
        found = []
        for which in (0, 1):
            lost = self._lost(layer, which, octaves[which])
            found.append((0.5 * torch.log2(1 + self.variance[layer][which] / lost)).sum((1, 3)))
        return torch.stack(found)

    def through(self, kv: KV, octaves: Octaves) -> KV:
        """What arrives of a cache; noise from torch's generator."""
        arrived = [self._layer_through(kv, layer, octaves[layer]) for layer in range(kv.geometry.n_layers)]
        return kv.with_groups(
            tuple(
                Group(
                    group.layers,
                    torch.stack([arrived[layer][0] for layer in group.layers]),
                    torch.stack([arrived[layer][1] for layer in group.layers]),
                )
                for group in kv.groups
            )
        )

    def _layer_through(self, kv: KV, layer: int, octaves: Tensor) -> tuple[Tensor, Tensor]:
        both = []
        for which, numbers in enumerate(kv.layer(layer)):
            mean, variance = self.mean[layer][which], self.variance[layer][which]
            lost = self._lost(layer, which, octaves[which])
            share = variance / (variance + lost)
            # A little more, or the root's slope is infinite where nothing is sent.
            spread = (share * (1 - share) + 1e-8) * variance
            both.append(
                mean + share * (numbers.float() - mean) + spread.sqrt() * torch.randn_like(numbers.float())
            )
        return both[0], both[1]

    def _lost(self, layer: int, which: int, octaves: Tensor) -> Float[Tensor, "batch heads tokens dim"]:
        return self.unit[layer][which] * 4.0 ** octaves[:, None, :, None] / 12

    def at_rate(self, kv: KV, octaves: Octaves, n_bits: Float[Tensor, " batch"]) -> Octaves:
        """Octaves moved so that each sequence takes so many bits; differentiable, the rate held."""
        held = kv.present.any(0)
        with torch.no_grad():
            low, high = (torch.full_like(n_bits, edge) for edge in (-_OCTAVES, _OCTAVES))
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                above = self._total(held, octaves + middle[:, None]) > n_bits
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            moved = octaves + high[:, None]
            slope = self._total(held, moved + _STEP) - self._total(held, moved - _STEP)
        # The move follows the octaves so that the total stays: the implicit function theorem, in one Newton step.
        moved = octaves + high[:, None]
        total = self._total(held, moved)
        return moved - ((total - total.detach()) / (slope / (2 * _STEP)).clamp(max=-1e-3))[:, None]

    def _total(self, held: Tensor, octaves: Octaves) -> Float[Tensor, " batch"]:
        return (self.bits(octaves) * held).sum((0, 1, 3))


def _variance(numbers: Float[Tensor, "n heads dim"]) -> Float[Tensor, "heads 1 dim"]:
    return numbers.var(0).clamp(min=1e-12).unsqueeze(1)


def _mean_square(units: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = (torch.stack([unit[which] for unit in units]).square().mean(0) for which in (0, 1))
    return keys.unsqueeze(1), values.unsqueeze(1)
