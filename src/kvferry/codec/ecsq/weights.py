"""How the step of the frame is weighted: for each layer's keys and values, for keys and values, or not at all.

A weight is a whole number of eighths of an octave. Without a profile it follows the deviation of what it weights, so
that a step means the same on every model: step 2**(i/64) is that share of it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from kvferry.codec.ecsq.layout import Block
from kvferry.codec.ecsq.measured import Measured
from kvferry.codec.varints import read_varints, unzigzag, write_varints, zigzag
from kvferry.errors import Malformed

Weighting = Literal["layer", "part", "frame"]
WEIGHT_EXPONENT = 8
"""64ths of an octave in a weight of 1."""
_LARGEST = 1024
_FLOOR = 2.0**-200


def weigh(parts: Sequence[Measured], n_layers: int, weighting: Weighting) -> list[int]:
    """The weights to send: two a layer, keys first; one for keys and one for values; or one. 0 without tokens."""
    blocks = [block for measured in parts for block in measured.part.blocks]
    size = np.array([block.n_channels for block in blocks], np.float64)
    power = np.concatenate([np.zeros(0), *(measured.power for measured in parts)])
    groups = np.array([_group(block, weighting) for block in blocks], np.int64)
    numbers = np.bincount(groups, size, _count(n_layers, weighting))
    mean = np.bincount(groups, size * power, len(numbers)) / np.maximum(numbers, 1)
    octaves = 0.5 * np.log2(np.maximum(mean, _FLOOR))
    weights = np.where(numbers > 0, np.rint(8 * octaves), 0).astype(int)
    return weights.tolist()


def exponents(
    blocks: Sequence[Block], weights: Sequence[int], weighting: Weighting
) -> Int64[np.ndarray, " n"]:
    """What the weights add to the exponent of each channel of some blocks, in 64ths of an octave."""
    each = np.array([weights[_group(block, weighting)] for block in blocks], np.int64)
    return WEIGHT_EXPONENT * np.repeat(each, [block.n_channels for block in blocks])


def write_weights(weights: Sequence[int]) -> bytes:
    """Zigzag varints."""
    return write_varints(zigzag(np.array(weights, np.int64)))


def read_weights(body: bytes | None, n_layers: int, weighting: Weighting) -> list[int]:
    """The inverse; `Malformed` for another number of weights, one beyond 1024, or one with needless bytes."""
    weights = unzigzag(read_varints(body or b""))
    wanted = _count(n_layers, weighting)
    short = write_weights(weights.tolist()) == body
    if not short or len(weights) != wanted or np.abs(weights).max(initial=0) > _LARGEST:
        what = f"{len(weights)} weights of at most {np.abs(weights).max(initial=0)}"
        raise Malformed(what, cure=f"Write {wanted} within {_LARGEST}, each in its shortest form")
    return weights.tolist()


def _count(n_layers: int, weighting: Weighting) -> int:
    return {"layer": 2 * n_layers, "part": 2, "frame": 1}[weighting]


def _group(block: Block, weighting: Weighting) -> int:
    return {"layer": 2 * block.layer + block.which, "part": block.which, "frame": 0}[weighting]
