"""Which numbers belong together: blocks, channels, rows, parts.

A *block* is the keys or the values of one layer. A *channel* is one place of one head of a block. A *row* is the
numbers of one precision class of a channel. A *part* is a run of whole layers and one PAYLOAD segment: it ends with the
layer that brings it to 2**18 numbers, so that a long message can be cut, and a small one pays for one segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64, UInt8

from kvferry.codec.manifest import Manifest

PART_NUMBERS = 1 << 18


@dataclass(frozen=True, eq=False)
class Block:
    """Keys (`which` 0) or values (1) of one layer, and its tokens by precision class."""

    layer: int
    which: int
    heads: int
    dim: int
    tokens: dict[int, Int64[np.ndarray, " held"]]
    """Precision class to the numbers of its tokens in the message, classes ascending."""

    @property
    def n_channels(self) -> int:
        return self.heads * self.dim

    @property
    def n_tokens(self) -> int:
        return sum(len(held) for held in self.tokens.values())


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks with tokens, in order of layers, keys before values, and their rows: by block, class, channel."""

    blocks: tuple[Block, ...]

    @cached_property
    def size(self) -> Int64[np.ndarray, " blocks"]:
        """Channels of each block."""
        return np.array([block.n_channels for block in self.blocks], np.int64)

    @cached_property
    def counts(self) -> Int64[np.ndarray, " blocks"]:
        """Tokens of each block."""
        return np.array([block.n_tokens for block in self.blocks], np.int64)

    @cached_property
    def n_tokens(self) -> Int64[np.ndarray, " channels"]:
        """Tokens of each channel."""
        return np.repeat(self.counts, self.size)

    @cached_property
    def alike(self) -> bool:
        """Whether all tokens are in class 1: rows are channels then."""
        return all(token_class == 1 for _, _, token_class, _ in self.groups)

    @cached_property
    def rows(self) -> "RowSet":
        if self.alike:
            channel = np.arange(self.size.sum())
            return RowSet(channel, np.ones_like(channel), self.n_tokens)
        groups = self.groups
        size = np.array([block.n_channels for block, _, _, _ in groups], np.int64)
        first = np.cumsum(self.size) - self.size
        start = np.array([first[index] for _, index, _, _ in groups], np.int64)
        channel = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size - start, size)
        classes = np.array([token_class for _, _, token_class, _ in groups], np.int64)
        lengths = np.array([len(held) for _, _, _, held in groups], np.int64)
        return RowSet(channel, np.repeat(classes, size), np.repeat(lengths, size))

    @cached_property
    def groups(self) -> list[tuple[Block, int, int, Int64[np.ndarray, " held"]]]:
        """Each block, its number, and each of its classes with the tokens in it: a row for each of its channels."""
        return [
            (block, index, token_class, held)
            for index, block in enumerate(self.blocks)
            for token_class, held in block.tokens.items()
        ]

    def row_groups(self) -> Iterator[tuple[Block, Int64[np.ndarray, " held"], slice]]:
        """The groups, each with the numbers of its rows."""
        at = 0
        for block, _, _, held in self.groups:
            yield block, held, slice(at, at + block.n_channels)
            at += block.n_channels


@dataclass(frozen=True, eq=False)
class RowSet:
    """One number a row."""

    channel: Int64[np.ndarray, " rows"]
    token_class: Int64[np.ndarray, " rows"]
    length: Int64[np.ndarray, " rows"]


def parts_of(manifest: Manifest) -> list[Part]:
    """The parts that follow from who holds which token in which class; a part may have no blocks."""
    parts: list[list[Block]] = [[]]
    numbers, classes_of = 0, manifest.classes
    alike = classes_of is None or classes_of.max(initial=1) == 1
    for layer, shape in enumerate(manifest.geometry.layers):
        if numbers >= PART_NUMBERS:
            parts.append([])
            numbers = 0
        held = np.flatnonzero(manifest.present[layer])
        for which, dim in enumerate((shape.key_dim, shape.value_dim)):
            if len(held):
                classes = (
                    {1: held} if classes_of is None or alike else _by_class(classes_of[layer, which], held)
                )
                parts[-1].append(Block(layer, which, shape.heads, dim, classes))
        numbers += len(held) * shape.heads * (shape.key_dim + shape.value_dim)
    return [Part(tuple(blocks)) for blocks in parts]


def _by_class(
    classes: UInt8[np.ndarray, " tokens"], held: Int64[np.ndarray, " held"]
) -> dict[int, Int64[np.ndarray, " _"]]:
    return {int(number): held[classes[held] == number] for number in np.unique(classes[held])}
