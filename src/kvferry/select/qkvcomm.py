"""Layers by what rounding does to attention: the more sensitive, the finer."""

from dataclasses import dataclass, replace
from math import isclose
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.errors import BadSpec, NotFinite
from kvferry.kv import KV, Group, Need, Plan
from kvferry.metrics.attention import attention_outputs, relative_error
from kvferry.select.graded import Graded, in_classes
from kvferry.select.probe import probe
from kvferry.select.sight import Budget, Sight

_EXACT = 16


@dataclass(frozen=True, repr=False)
class QKVComm(Graded):
    """The most sensitive `shares[0]` of the layers at `bits[0]` bits, and so on down (Q-KVComm, arXiv:2512.17914).

    The paper calls sensitive what rounding changes most in keys and values themselves. Here it is what it changes in
    what attention reads: the relative error of the last `window` queries with the layer at the fewest bits.

    >>> QKVComm(bits=(8, 4), shares=(0.5, 0.5)).brief()
    'qkvcomm(shares=(0.5, 0.5), bits=(8, 4))'
    """

    name: ClassVar[str] = "qkvcomm"
    needs: ClassVar[tuple[Need, ...]] = ("queries_content",)
    shares: tuple[float, ...] = (0.3, 0.4, 0.3)
    bits: tuple[int, ...] = (8, 6, 4)
    window: int = 32

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.bits) or min(self.shares, default=0) <= 0 or self.window < 1:
            raise BadSpec(
                f"{self.brief()}", cure="Give a share above 0 for each of bits, and a window of 1 or more"
            )
        if not isclose(sum(self.shares), 1.0, abs_tol=1e-6) or sorted(self.bits, reverse=True) != [
            *self.bits
        ]:
            raise BadSpec(f"{self.brief()}", cure="Shares sum to 1, bits fall")
        self._classes()

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held = self.eligible(sight)
        harms = sensitivity(sight, min(self.bits), self.window)
        if bool(harms.isnan().any()):
            layer = int(harms.isnan().nonzero()[0])
            raise NotFinite(
                f"what layer {layer} reads is NaN", cure="Check the model's dtype: fp16 overflows"
            )
        return self.within(in_classes(held, self.grade(harms).unsqueeze(1)), budget)

    def grade(self, harms: Float[Tensor, " layers"]) -> Int[Tensor, " layers"]:
        """The class of each layer: shares rounded, the earlier of equal layers first."""
        place = harms.sort(descending=True, stable=True).indices.argsort()
        ends = [round(sum(self.shares[: i + 1]) * len(harms)) for i in range(len(self.shares) - 1)]
        rank = (place.unsqueeze(1) >= torch.tensor(ends, device=harms.device)).sum(1)
        return torch.tensor(self._classes(), device=harms.device)[rank]

    def _classes(self) -> list[int]:
        return [self.class_of("fp16" if n == _EXACT else f"int{n}") for n in self.bits]


def sensitivity(sight: Sight, bits: int, window: int) -> Float[Tensor, " layers"]:
    """Relative error of what the last queries read of each layer once what is sent is rounded, mean over heads."""
    coarse = replace(sight, read=_rounded(sight, bits))
    return torch.stack([_harm(sight, coarse, layer, window) for layer in range(sight.read.geometry.n_layers)])


def _harm(sight: Sight, coarse: Sight, layer: int, window: int) -> Float[Tensor, ""]:
    whole, rounded = (_outputs(one, layer, window) for one in (sight, coarse))
    every = torch.ones(whole.shape[0], whole.shape[2], dtype=torch.bool, device=whole.device)
    return relative_error(rounded, whole, every).mean()


def _outputs(sight: Sight, layer: int, window: int) -> Float[Tensor, "1 queries new value_dim"]:
    posed = probe(sight, layer, window)
    values = sight.read.layer(layer)[1]
    return attention_outputs(posed.queries, posed.keys, values, posed.visible, posed.scores)


def _rounded(sight: Sight, bits: int) -> KV:
    """What was read with the tokens that a slot carries rounded, one scale for a token and head."""
    sent = sight.carried.any(0).unsqueeze(-1)

    def coarse(numbers: Tensor) -> Tensor:
        return torch.where(sent, rounded(numbers.float(), bits), numbers.float())

    groups = (Group(g.layers, coarse(g.keys), coarse(g.values)) for g in sight.read.groups)
    return sight.read.with_groups(tuple(groups))


def rounded(numbers: Float[Tensor, "*rows dim"], bits: int) -> Float[Tensor, "*rows dim"]:
    """Each row to whole multiples of its largest number's `2**(bits-1) - 1`th part.

    >>> rounded(torch.tensor([[-1.0, 0.3, 0.9]]), bits=2).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    scale = numbers.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (numbers / scale.clamp(min=torch.finfo(numbers.dtype).tiny)).round() * scale
