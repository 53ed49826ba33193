"""Noise shaping: each channel of a head is rounded with the errors of the channels before it in mind.

What an error e does to a model's predictions is e' F e, with F the Fisher information of a head's channels. F is A' D A
with A unit lower triangular, so the damage is that of (A e): a channel's own rounding error plus A times the errors
before it. Subtracting the latter before rounding leaves rounding errors alone to be felt, each by its D. Only the
encoder does this: what is sent is whole numbers on the same grid. The same idea for weights: GPTQ (arXiv:2210.17323),
LDLQ (arXiv:2307.13304).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from kvferry.codec.ecsq.feedback import feed_back
from kvferry.codec.ecsq.grid import centre
from kvferry.codec.ecsq.layout import Block
from kvferry.codec.ecsq.source import Arrays, BlockArray, Quantised
from kvferry.codec.entropy.tables import N_CENTROIDS
from kvferry.codec.fast import available, compiled

Feedback = dict[tuple[int, int], Float32[np.ndarray, "heads dim dim"]]
"""A of each layer's keys (0) and values (1)."""


@dataclass(frozen=True, eq=False)
class Shaped:
    """The blocks of a part, to be rounded plainly: errors are fed back already."""

    blocks: dict[tuple[int, int], BlockArray]

    def __call__(self, block: Block) -> BlockArray:
        return self.blocks[block.layer, block.which]


def shape(quantised: Quantised, arrays: Arrays, feedback: Feedback) -> Shaped:
    """Feed errors back in all blocks of a part."""
    blocks: dict[tuple[int, int], BlockArray] = {}
    for block, held, rows in quantised.part.row_groups():
        key = block.layer, block.which
        if key not in blocks:
            blocks[key] = arrays(block).copy()
        blocks[key][:, held] = _shape_rows(quantised, blocks[key][:, held], rows, feedback[key])
    return Shaped(blocks)


def _shape_rows(
    quantised: Quantised,
    numbers: Float32[np.ndarray, "heads held dim"],
    rows: slice,
    feedback: Float32[np.ndarray, "heads dim dim"],
) -> Float32[np.ndarray, "heads held dim"]:
    """The tokens of one class of one block."""
    by_channel = (numbers.shape[0], numbers.shape[2])
    mean = quantised.mean[rows].reshape(by_channel)
    step = quantised.step[rows].reshape(by_channel)
    centres = _centres(quantised.level[rows]).reshape(*by_channel, N_CENTROIDS)
    target = np.ascontiguousarray(numbers.transpose(0, 2, 1)) - mean[..., None]
    (compiled(feed_back) if available() else _feed_back)(target, feedback, step, centres)
    return (target + mean[..., None]).transpose(0, 2, 1)


def _feed_back(
    target: Float32[np.ndarray, "heads dim held"],
    feedback: Float32[np.ndarray, "heads dim dim"],
    step: Float32[np.ndarray, "heads dim"],
    centres: Float32[np.ndarray, "heads dim magnitudes"],
) -> None:
    """Round channel after channel; subtract what its error means for those to come. In place."""
    original = target.copy()
    inverse = np.float32(1) / step
    for place in range(target.shape[1]):
        whole = np.rint(target[:, place] * inverse[:, place, None])
        small = np.minimum(np.abs(whole), N_CENTROIDS - 1).astype(np.int64)
        inner = np.take_along_axis(centres[:, place], small, axis=1) * np.sign(whole)
        decoded = np.where(np.abs(whole) < N_CENTROIDS, inner, whole) * step[:, place, None]
        error = decoded - original[:, place]
        target[:, place + 1 :] -= feedback[:, place + 1 :, place, None] * error[:, None]


def _centres(level: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows magnitudes"]:
    """What the magnitudes 0 to 3 are decoded to."""
    magnitudes = np.broadcast_to(np.arange(N_CENTROIDS), (len(level), N_CENTROIDS))
    return centre(magnitudes, np.broadcast_to(level[:, None], magnitudes.shape))
