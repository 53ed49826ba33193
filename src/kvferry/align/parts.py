"""A token's features cut into parts: the keys, or the values, of some layers of one model.

Which features of the sender a part of the receiver is made from is a layer map: `sources[i]` are the sender's layers
for the receiver's layers `targets[i]`, for keys and for values alike. A part without sources is made from nothing: all
that a map can give it is its mean.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.align.blocks import KEY, VALUE, cells
from kvferry.errors import UsageError
from kvferry.kv import Geometry

Layers = Sequence[Sequence[int]]
"""Of each part, the layers that it holds."""


@dataclass(frozen=True)
class Entries:
    """What a part holds per token. Layers that differ in shape count as one layer of one head."""

    layers: int
    heads: int
    dim: int

    @property
    def width(self) -> int:
        return self.layers * self.heads * self.dim


@dataclass(frozen=True)
class Parts:
    """All parts that are made alike: their shapes, and where their numbers stand in `features.flatten`.

    A part of the sender comes with that of the tokens before it: `n_back` times `sent`, the token itself first.
    """

    sent: Entries
    held: Entries
    n_back: int
    columns: Int[Tensor, "parts features"]
    places: Int[Tensor, "parts out"]

    @property
    def n_parts(self) -> int:
        return len(self.columns)

    @property
    def n_in(self) -> int:
        return self.n_back * self.sent.width

    @property
    def n_out(self) -> int:
        return self.held.width


def parts_of(
    sender: Geometry, receiver: Geometry, sources: Layers, targets: Layers, n_back: int
) -> list[Parts]:
    """The parts of a layer map, those of equal shape together. Raises `UsageError` for a map that cannot be."""
    _check(sender, receiver, sources, targets, n_back)
    rows: dict[tuple[Entries, Entries], list[tuple[list[int], list[int]]]] = defaultdict(list)
    for which in (KEY, VALUE):
        for some, others in zip(sources, targets, strict=True):
            sent, columns = _part(sender, some, which)
            held, places = _part(receiver, others, which)
            wide = [back * sender.floats_per_token + column for back in range(n_back) for column in columns]
            rows[sent, held].append((wide, places))
    return [
        Parts(*shapes, n_back, _numbers(row[0] for row in found), _numbers(row[1] for row in found))
        for shapes, found in rows.items()
    ]


def _numbers(rows: Iterable[list[int]]) -> Int[Tensor, "parts features"]:
    return torch.tensor([*rows], dtype=torch.long)


def _part(geometry: Geometry, layers: Sequence[int], which: int) -> tuple[Entries, list[int]]:
    """Shape of the keys or values of some layers, and where they stand."""
    shapes = [(geometry.layers[i].heads, _dim(geometry, i, which)) for i in layers]
    places = cells(geometry)
    numbers = [
        n
        for i, (heads, _) in zip(layers, shapes, strict=True)
        for h in range(heads)
        for n in places[i, which, h]
    ]
    alike = len(set(shapes)) == 1
    return Entries(len(layers), *shapes[0]) if alike else Entries(1, 1, len(numbers)), numbers


def _dim(geometry: Geometry, layer: int, which: int) -> int:
    return geometry.layers[layer].value_dim if which == VALUE else geometry.layers[layer].key_dim


def _check(sender: Geometry, receiver: Geometry, sources: Layers, targets: Layers, n_back: int) -> None:
    if n_back < 1:
        raise UsageError(f"{n_back} neighbours", cure="Give at least 1, the token itself")
    if len(sources) != len(targets):
        what = f"sources for {len(sources)} and targets for {len(targets)} parts"
        raise UsageError(what, cure="Give each part its layers of the sender")
    if not {i for some in sources for i in some} <= {*range(sender.n_layers)}:
        raise UsageError(f"sources {sources}", cure=f"Name layers 0 to {sender.n_layers - 1} of the sender")
    if sorted(i for some in targets for i in some) != list(range(receiver.n_layers)) or not all(targets):
        cure = f"Name each of the {receiver.n_layers} layers of the receiver once"
        raise UsageError(f"targets {targets}", cure=cure)
