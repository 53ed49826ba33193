"""From what is known of a block to its numbers.

The error that a model feels is A e, A the profile's matrix of a head and e its channels' errors (ecsq/shaping.py).
The coarsest layer is shaped: channel i is rounded to x + A (x - y), y what is decoded of the channels before it. That
target minus what a later stage makes of it is the felt error itself, so each stage just divides its cell. What is
decoded then is the target, and the channels follow from it: each less A times what refined those before it.
"""

import numpy as np
from jaxtyping import Float32

from kvferry.codec.ecsq.shaping import Feedback
from kvferry.codec.ecsq.source import Arrays
from kvferry.codec.fast import available, compiled
from kvferry.codec.progressive import loops
from kvferry.codec.progressive.ladder import Known, Ladder
from kvferry.codec.progressive.stages import layer_of
from kvferry.errors import Malformed

ByChannel = Float32[np.ndarray, "_heads _dim _held"]


def write_block(ladder: Ladder, known: Known, feedback: Feedback, arrays: Arrays) -> None:
    """Write the numbers of a block as far as they are known; `feedback` is empty without a profile.

    Raises `Malformed` where refined numbers are not finite.
    """
    block, mean = ladder.block, ladder.quantised.mean
    matrices = feedback.get((block.layer, block.which))
    found = _deviations(ladder, known)
    if matrices is not None and known.stage:
        up = layer_of(0, ladder.n_layers) - layer_of(known.stage, ladder.n_layers)
        first = ladder.coarsest(ladder.ancestors(known.numbers, up))
        for numbers, coarsest in zip(found, _deviations(ladder, first), strict=True):
            _undo_shaping(numbers, coarsest, matrices)
    for numbers, (_, held, rows) in zip(found, ladder.quantised.part.row_groups(), strict=True):
        numbers += mean[rows].reshape(block.heads, block.dim, 1)
        if not np.isfinite(numbers).all():
            raise Malformed("a number that is not finite", cure="Write it with kvferry.codec")
        arrays(block)[:, held] = numbers.transpose(0, 2, 1)


def _deviations(ladder: Ladder, known: Known) -> list[ByChannel]:
    """By class of tokens, numbers without their means; those of silent channels are 0."""
    rows = ladder.rows(known.stage)
    flat = ladder.centres(known) * np.repeat(ladder.steps(known.stage), rows.lengths)
    found, at, block = [], 0, ladder.block
    for held, _, channels in ladder.groups():
        numbers = np.zeros((block.n_channels, len(held)), np.float32)
        size = len(channels) * len(held)
        numbers[channels] = flat[at : at + size].reshape(len(channels), len(held))
        found.append(numbers.reshape(block.heads, block.dim, len(held)))
        at += size
    return found


def _undo_shaping(
    numbers: ByChannel, coarsest: ByChannel, feedback: Float32[np.ndarray, "heads dim dim"]
) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        (compiled(loops.undo_shaping) if available() else _undo_plainly)(numbers, coarsest, feedback)


def _undo_plainly(
    numbers: ByChannel, coarsest: ByChannel, feedback: Float32[np.ndarray, "heads dim dim"]
) -> None:
    for place in range(numbers.shape[1]):
        refined = numbers[:, place] - coarsest[:, place]
        numbers[:, place + 1 :] -= feedback[:, place + 1 :, place, None] * refined[:, None]
