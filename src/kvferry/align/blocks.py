"""Affine maps in blocks: which features of the sender each group of the receiver's features is read off.

The unit is a cell: one head of the keys or of the values of one layer. Cells of the receiver that read the same cells
of the sender make one block, so that what they share is solved and computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.layer_map import LAYER_MAPS, Depths, NearestDepth, Sources
from kvferry.align.ridge import Sums
from kvferry.errors import UsageError
from kvferry.kv import KV, Geometry

KEY, VALUE = 0, 1
Reads = Literal["both", "same"]
"""Keys are read off keys and values, or off keys alone; values likewise."""
Cell = tuple[int, int, int]
"""Layer, KEY or VALUE, head."""
Affine = tuple[Tensor, Tensor]
"""Weight `[features, out]` and bias `[out]`."""


@dataclass(frozen=True, eq=False)
class Block:
    """Features of the receiver (`outputs`) that are read off the same ones of the sender (`inputs`).

    Numbers count as in `features.with_neighbours` and `features.flatten`.
    """

    inputs: Int[Tensor, " features"]
    outputs: Int[Tensor, " out"]


def cells(geometry: Geometry) -> dict[Cell, range]:
    """Where each cell stands in `features.flatten`."""
    found, start = {}, 0
    for members in geometry.groups():
        first = geometry.layers[members[0]]
        for kind, dim in ((KEY, first.key_dim), (VALUE, first.value_dim)):
            for cell in ((layer, kind, head) for layer in members for head in range(first.heads)):
                found[cell] = range(start, start + dim)
                start += dim
    return found


def layer_features(geometry: Geometry, layer: int, neighbours: int = 1) -> Int[Tensor, " features"]:
    """Where the keys and values of one layer stand."""
    return _features(geometry, [cell for cell in cells(geometry) if cell[0] == layer], neighbours)


def blocks_of(
    contract: Contract, sources: Sources, heads: str = "all", reads: Reads = "both", neighbours: int = 1
) -> list[Block]:
    """The blocks of a map that reads these layers of the sender.

    `heads` is a rule of `LAYER_MAPS` and says which heads of a sender layer a head of a receiver layer reads; with
    `all`, whole layers are read. Raises `UsageError` for layers or neighbours that do not exist.
    """
    sender, receiver = contract.sender, contract.receiver
    _check(contract, sources, neighbours)
    merged: dict[tuple[Cell, ...], list[Cell]] = {}
    for cell in cells(receiver):
        merged.setdefault(_read(contract, cell, sources, heads, reads), []).append(cell)
    return [
        Block(_features(sender, read, neighbours), _features(receiver, written, 1))
        for read, written in merged.items()
    ]


def restrict(sums: Sums, block: Block) -> Sums:
    """The sums of a block alone."""
    inputs, outputs = block.inputs.to(sums.xx.device), block.outputs.to(sums.xx.device)
    return Sums(
        sums.n,
        sums.x[inputs],
        sums.y[outputs],
        sums.xx[inputs[:, None], inputs],
        sums.xy[inputs[:, None], outputs],
        sums.yy[outputs],
    )


def block_sums(
    x: Float[Tensor, "tokens features"], y: Float[Tensor, "tokens out"], blocks: Sequence[Block]
) -> list[Sums]:
    """What `restrict` gives, summed block by block: for models whose dense sums would not fit in memory."""
    return [Sums.of(x[:, block.inputs], y[:, block.outputs]) for block in blocks]


class BlockMap(Aligner):
    """`receiver = sender @ weight + bias`, where `weight` is zero outside of the blocks and only they are kept.

    `sources[i]` are the layers of the sender that layer i of the receiver reads, by default the one nearest in depth. A
    layer without sources is its bias everywhere. `heads` and `reads` as in `blocks_of`; a sender token comes with the
    `neighbours - 1` tokens before it.
    """

    _order: Tensor

    def __init__(
        self,
        contract: Contract,
        sources: Sequence[Sequence[int]] | None = None,
        heads: str = "all",
        reads: Reads = "both",
        neighbours: int = 1,
    ) -> None:
        super().__init__(contract)
        depths = Depths(contract.sender.n_layers, contract.receiver.n_layers)
        chosen = NearestDepth()(depths) if sources is None else sources
        self.sources: Sources = tuple(tuple(row) for row in chosen)
        self.heads, self.reads, self.neighbours = heads, reads, neighbours
        self.blocks = blocks_of(contract, self.sources, heads, reads, neighbours)
        stacks = (_Stack(blocks) for blocks in _alike(self.blocks, contract.receiver))
        self._stacks = cast(Sequence[_Stack], nn.ModuleList(stacks))
        places = torch.cat([stack.outputs.flatten() for stack in self._stacks])
        self.register_buffer("_order", places.argsort(), persistent=False)
        self.bias = nn.Parameter(torch.zeros(contract.receiver.floats_per_token))

    def options(self) -> dict[str, Any]:
        sources = [list(row) for row in self.sources]
        return {"sources": sources, "heads": self.heads, "reads": self.reads, "neighbours": self.neighbours}

    @torch.no_grad()
    def set_blocks(self, maps: Sequence[Affine]) -> None:
        """Take weight and bias of each of `self.blocks`, in their order."""
        for block, (_, bias) in zip(self.blocks, maps, strict=True):
            self.bias[block.outputs.to(self.bias.device)] = bias.to(self.bias)
        weights = {id(block): weight for block, (weight, _) in zip(self.blocks, maps, strict=True)}
        for stack in self._stacks:
            stack.weight.copy_(torch.stack([weights[id(block)] for block in stack.blocks]))

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(with_neighbours(kv, self.neighbours)), self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours'."""
        made = [stack(wide).flatten(-2) for stack in self._stacks]
        return torch.cat(made, -1)[..., self._order] + self.bias


class _Stack(nn.Module):
    """Blocks of equal shape, one weight each, computed in one pass."""

    inputs: Tensor
    outputs: Tensor

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("inputs", torch.stack([block.inputs for block in blocks]), persistent=False)
        self.register_buffer("outputs", torch.stack([block.outputs for block in blocks]), persistent=False)
        self.weight = nn.Parameter(torch.zeros(*self.inputs.shape, self.outputs.shape[1]))

    def forward(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch blocks out"]:
        return torch.einsum("...ki,kio->...ko", wide[..., self.inputs], self.weight)


def _alike(blocks: Sequence[Block], receiver: Geometry) -> list[list[Block]]:
    """Blocks of one receiver layer and of equal shape: no more inputs than a layer reads are gathered at once."""
    layer_of = {places.start: cell[0] for cell, places in cells(receiver).items()}

    def shape(block: Block) -> tuple[int, int, int]:
        return layer_of[int(block.outputs[0])], len(block.inputs), len(block.outputs)

    return [list(group) for _, group in groupby(sorted(blocks, key=shape), key=shape)]


def _check(contract: Contract, sources: Sources, neighbours: int) -> None:
    n_sender, n_receiver = contract.sender.n_layers, contract.receiver.n_layers
    if len(sources) != n_receiver or not {layer for row in sources for layer in row} <= {*range(n_sender)}:
        cure = f"Give {n_receiver} rows of layers below {n_sender}"
        raise UsageError(f"sources {sources}", cure=cure)
    if neighbours < 1:
        raise UsageError(f"{neighbours} neighbours", cure="Give at least 1, the token itself")


def _read(contract: Contract, cell: Cell, sources: Sources, heads: str, reads: Reads) -> tuple[Cell, ...]:
    """The cells of the sender that one of the receiver is read off."""
    layer, kind, head = cell
    sender, n_held = contract.sender, contract.receiver.layers[layer].heads
    return tuple(
        (source, read, sent)
        for source in sources[layer]
        for read in ((kind,) if reads == "same" else (KEY, VALUE))
        for sent in LAYER_MAPS.parse(heads)(Depths(sender.layers[source].heads, n_held))[head]
    )


def _features(geometry: Geometry, some: Sequence[Cell], neighbours: int) -> Int[Tensor, " features"]:
    places = cells(geometry)
    one = [place for cell in some for place in places[cell]]
    wide = [back * geometry.floats_per_token + place for back in range(neighbours) for place in one]
    return torch.tensor(wide, dtype=torch.long)
