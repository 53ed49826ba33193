"""Which layers of the sender a layer of the receiver reads.

Layers are numbered from the input on. A rule looks at `Depths` and gives `Sources`: for each receiver layer the sender
layers that it reads, in rising order, none where it has no source. Rules go by name, `LAYER_MAPS.parse("terminal")`.
A rule never looks at what a layer is, so the same rules say which of the sender's heads a head of the receiver reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from kvferry.errors import BadSpec, ShapeMismatch, UsageError
from kvferry.spec import Method, Table

Sources = tuple[tuple[int, ...], ...]
"""For each receiver layer, the sender layers that it reads."""


@dataclass(frozen=True)
class Depths:
    """How many layers both models have and, for rules that need them, numbers measured or learned for each pair."""

    n_sender: int
    n_receiver: int
    errors: Float[Tensor, "receiver sender"] | None = None
    """Held-out error of reading each receiver layer off each sender layer alone (`blockwise.layer_errors`)."""
    weights: Float[Tensor, "receiver sender"] | None = None
    """What a trained `LayerWeights` gives."""

    def __post_init__(self) -> None:
        shape = (self.n_receiver, self.n_sender)
        if min(shape) < 1:
            raise UsageError(f"{shape[1]} sender and {shape[0]} receiver layers", cure="Give at least one")
        for what, numbers in (("errors", self.errors), ("weights", self.weights)):
            if numbers is not None and tuple(numbers.shape) != shape:
                cure = f"Give one for each pair, {shape}"
                raise ShapeMismatch(f"{what} of shape {tuple(numbers.shape)}", cure=cure)


@dataclass(frozen=True, repr=False)
class LayerMap(Method, ABC):
    """A rule. Call it with the depths of both models."""

    @abstractmethod
    def __call__(self, depths: Depths) -> Sources: ...


class Terminal(LayerMap):
    """Last layer to last layer, and so on downwards until the shallower model ends: the rest has no source.

    This is what the C2C paper describes (arXiv:2510.03215); its code does `LastAligned`.

    >>> LAYER_MAPS.parse("terminal")(Depths(n_sender=2, n_receiver=4))
    ((), (), (0,), (1,))
    """

    name: ClassVar[str] = "terminal"

    def __call__(self, depths: Depths) -> Sources:
        shift = depths.n_sender - depths.n_receiver
        return tuple((layer + shift,) if layer + shift >= 0 else () for layer in range(depths.n_receiver))


class LastAligned(LayerMap):
    """`Terminal`, clamped: receiver layers below the sender's first one read that one. As published with C2C.

    Between models of 28 and 16 layers, 13 of the 28 then read what is hardly more than token embeddings.
    """

    name: ClassVar[str] = "last_aligned"

    def __call__(self, depths: Depths) -> Sources:
        shift = depths.n_sender - depths.n_receiver
        return _one_each(depths, lambda layer: max(0, layer + shift))


@dataclass(frozen=True, repr=False)
class NearestDepth(LayerMap):
    """The `k` layers nearest in depth, where 0 is a model's first layer and 1 its last; of two, the shallower.

    >>> LAYER_MAPS.parse("nearest_depth")(Depths(n_sender=3, n_receiver=4))
    ((0,), (1,), (1,), (2,))
    """

    name: ClassVar[str] = "nearest_depth"
    k: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self.name, self.k)

    def __call__(self, depths: Depths) -> Sources:
        return _smallest(distances(depths.n_sender, depths.n_receiver), self.k)


class Ratio(LayerMap):
    """Layer t reads layer `t * n_sender / n_receiver`, rounded down: first to first, the last may stay unread."""

    name: ClassVar[str] = "ratio"

    def __call__(self, depths: Depths) -> Sources:
        return _one_each(depths, lambda layer: layer * depths.n_sender // depths.n_receiver)


class Uniform(LayerMap):
    """The sender is cut into as many bands of consecutive layers, of equal size up to one; each is read by one layer.

    A receiver with more layers than the sender reads some layers twice; where others use this rule, its layers
    without a band stay zero.

    >>> LAYER_MAPS.parse("uniform")(Depths(n_sender=5, n_receiver=2))
    ((0, 1), (2, 3, 4))
    """

    name: ClassVar[str] = "uniform"

    def __call__(self, depths: Depths) -> Sources:
        borders = [t * depths.n_sender // depths.n_receiver for t in range(depths.n_receiver + 1)]
        return tuple(tuple(range(start, max(end, start + 1))) for start, end in pairwise(borders))


class Skip(LayerMap):
    """Every n-th layer from the first on, n being how many times the receiver's depth fits into the sender's.

    A deeper receiver's last layers all read the sender's last.
    """

    name: ClassVar[str] = "skip"

    def __call__(self, depths: Depths) -> Sources:
        step = max(1, depths.n_sender // depths.n_receiver)
        return _one_each(depths, lambda layer: min(layer * step, depths.n_sender - 1))


class All(LayerMap):
    """Every layer reads every layer: nothing is presumed, and the map is as large as can be."""

    name: ClassVar[str] = "all"

    def __call__(self, depths: Depths) -> Sources:
        return (tuple(range(depths.n_sender)),) * depths.n_receiver


@dataclass(frozen=True, repr=False)
class TopKSources(LayerMap):
    """The `k` layers from which alone it is best predicted on held-out data; of equals, the shallower.

    Eight sources for each layer are what arXiv:2608.03893 fits from. Raises `UsageError` without errors.
    """

    name: ClassVar[str] = "top_k_sources"
    k: int = 8

    def __post_init__(self) -> None:
        _at_least_one(self.name, self.k)

    def __call__(self, depths: Depths) -> Sources:
        if depths.errors is None:
            raise UsageError(f"{self!r} without errors", cure="Measure them with blockwise.layer_errors")
        return _smallest(depths.errors.nan_to_num(nan=float("inf")), self.k)


class Learned(LayerMap):
    """The layers that trained weights leave above zero. Raises `UsageError` without weights."""

    name: ClassVar[str] = "learned"

    def __call__(self, depths: Depths) -> Sources:
        if depths.weights is None:
            cure = "Train a LayerWeights together with a projector and give what it returns"
            raise UsageError("learned, without weights", cure=cure)
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in depths.weights)


_HERE = (All, LastAligned, Learned, NearestDepth, Ratio, Skip, Terminal, TopKSources, Uniform)
LAYER_MAPS: "Table[LayerMap]" = Table(
    "layer_map", {rule.name: f"{rule.__module__}:{rule.__name__}" for rule in _HERE}
)
"""Every rule by name, `LAYER_MAPS.parse("top_k_sources(k=2)")(depths)`."""


def distances(n_sender: int, n_receiver: int) -> Float64[Tensor, "receiver sender"]:
    """How far apart in depth two layers stand, where 0 is a model's first layer, 1 its last, and a single one is last.

    >>> distances(3, 2).tolist()
    [[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]
    """
    (one, whole), (other, other_whole) = _depth(n_receiver), _depth(n_sender)
    return (one[:, None] * other_whole - other * whole).abs().double() / (whole * other_whole)


def _depth(n_layers: int) -> tuple[Int[Tensor, " layers"], int]:
    """Numerators and denominator: equal distances must be equal numbers."""
    return (torch.arange(n_layers), n_layers - 1) if n_layers > 1 else (torch.ones(1, dtype=torch.long), 1)


def _one_each(depths: Depths, source: Callable[[int], int]) -> Sources:
    return tuple((source(layer),) for layer in range(depths.n_receiver))


def _smallest(numbers: Float[Tensor, "receiver sender"], k: int) -> Sources:
    chosen = numbers.argsort(dim=1, stable=True)[:, :k].sort(1).values
    return tuple(tuple(row) for row in chosen.tolist())


def _at_least_one(name: str, k: int) -> None:
    if k < 1:
        raise BadSpec(f"{name}(k={k})", cure="Read at least one layer")
