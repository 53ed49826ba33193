"""What of an aligner is trained, in which coordinates, and what is kept of it afterwards."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from kvferry.align.contract import Aligner
from kvferry.align.linear import Linear, affine
from kvferry.align.narrow import NarrowMLP
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.kv import KV
from kvferry.train.paired import Pairs
from kvferry.train.whitened import Whitened


class Trainable(nn.Module, ABC):
    """Maps caches while it is trained; `finish` gives the aligner to be stored."""

    @abstractmethod
    def forward(self, kv: KV) -> KV: ...

    @abstractmethod
    def finish(self) -> Aligner: ...


def trainable(aligner: Aligner, pairs: Pairs) -> Trainable:
    """The form in which an aligner is trained: an affine map in whitened coordinates, others as they are."""
    return _WhitenedLinear(aligner, pairs) if isinstance(aligner, Linear) else _AsItIs(aligner)


class _AsItIs(Trainable):
    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, kv: KV) -> KV:
        return self.aligner(kv)

    def finish(self) -> Aligner:
        return self.aligner.fold() if isinstance(self.aligner, NarrowMLP | ResidualMLP) else self.aligner


class _WhitenedLinear(Trainable):
    def __init__(self, linear: Linear, pairs: Pairs) -> None:
        super().__init__()
        self.contract, self.neighbours = linear.contract, linear.neighbours
        weight, bias = linear.weight.detach().cpu(), linear.bias.detach().cpu()
        self.whitened = Whitened(pairs.narrowed(linear.neighbours).sums, weight, bias).to(
            linear.weight.device
        )

    def forward(self, kv: KV) -> KV:
        weight, bias = self.whitened()
        return affine(kv, weight, bias, self.contract)

    @torch.no_grad()
    def finish(self) -> Aligner:
        linear = Linear(self.contract, self.neighbours)
        weight, bias = self.whitened()
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        return linear.to(weight.device)
