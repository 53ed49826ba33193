"""How steps are nested: each layer divides the cells of the one before by three, in two stages.

    layer k + 1   |            m            |     cells of 3**(k+1) finest steps, m the middle one of its thirds
    first stage   |      open      |  outer |     is it the third away from zero?
    second stage  | inner | middle |  outer |     if not: is it the one towards zero?

Cells of ratio 3 stay centred, so every layer is a uniform quantiser with a cell about zero; bits would cut that cell in
half. A message that stops between two layers would pay for numbers of which some are three times as fine as others: up
to 0.4 bit a number. The stage between them halves that.
"""

import numpy as np
from jaxtyping import Int64

from kvferry.codec.ecsq.grid import MAX_EXPONENT
from kvferry.codec.entropy.tables import LOWEST

LEVELS = (0, 6, 13, 19, 25)
"""Quarter octaves in 3**k, rounded: what a level loses k layers up."""
EXPONENTS = (0, 101, 203, 304, 406)
"""64ths of an octave in 3**k, rounded: what bounds the steps of the coarsest layer."""
MAX_LAYERS = len(LEVELS)

Numbers = Int64[np.ndarray, "*shape"]


def n_stages(n_layers: int) -> int:
    """Stages of a message: the coarsest layer, and two for each finer one.

    >>> n_stages(3)
    5
    """
    return 2 * n_layers - 1


def layer_of(stage: int, n_layers: int) -> int:
    """The layer in whose steps a stage counts; 0 is the finest.

    >>> [layer_of(stage, 3) for stage in range(n_stages(3))]
    [2, 1, 1, 0, 0]
    """
    return n_layers - 1 - (stage + 1) // 2


def parent(numbers: Numbers) -> Numbers:
    """The cells, one layer up, that these lie in.

    >>> parent(np.array([-2, -1, 0, 1, 2, 4])).tolist()
    [-1, 0, 0, 0, 1, 1]
    """
    return (numbers + 1) // 3


def level_at(level: Numbers, layer: int) -> Numbers:
    """The level of a row `layer` layers up."""
    return np.maximum(level - LEVELS[layer], LOWEST)


def highest_exponent(n_layers: int) -> int:
    """Of a finest step: with a higher one a number of the coarsest layer may not be finite."""
    return MAX_EXPONENT - EXPONENTS[n_layers - 1]
