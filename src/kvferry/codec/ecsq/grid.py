"""Steps, means and levels of all channels of a frame: how numbers become whole ones, and back.

    number -(- mean)-(/ step)-(round)-> whole number -(centre of its cell)-(* step)-(+ mean)-> number

Exponents are whole 64ths of an octave, levels whole quarter octaves: both ends compute them in integers.
"""

from dataclasses import dataclass
from decimal import Decimal
from functools import cache

import numpy as np
from jaxtyping import Float32, Float64, Int64

from kvferry.codec.entropy.symbols import MAX_LEVEL, level_of
from kvferry.codec.entropy.tables import LOWEST, N_CENTROIDS, tables
from kvferry.errors import Malformed
from kvferry.wire.fields import STEPS_PER_OCTAVE

_OCTAVE_LOG2 = STEPS_PER_OCTAVE.bit_length() - 1
CLASS_EXPONENT, CLASS_LEVEL = 32, 2
"""Each precision class is half an octave coarser than the one before."""
SILENT = LOWEST - 1
"""Level of a channel whose numbers are all 0; they are not sent."""
_COARSE_TOKENS = 64
"""With fewer tokens, levels are sent in half octaves."""

Exponents = Int64[np.ndarray, " n"]


MAX_EXPONENT = 88 * STEPS_PER_OCTAVE
_LARGEST_MEAN = 2.0**126
"""Below 2**31 steps of 2**88, half an octave more for each class, and such a mean, all numbers are finite."""


@dataclass(frozen=True)
class Grid:
    """For class 1; class c adds `CLASS_EXPONENT * (c - 1)` to the exponent and takes as many levels less.

    Raises `Malformed` for steps and means with which a number may not be finite.
    """

    exponent: Int64[np.ndarray, " channels"]
    step: Float32[np.ndarray, " channels"]
    """`step_size` of it."""
    level: Int64[np.ndarray, " channels"]
    mean: Float32[np.ndarray, " channels"]

    def __post_init__(self) -> None:
        highest, mean = int(self.exponent.max(initial=0)), np.abs(self.mean).max(initial=0)
        if highest > MAX_EXPONENT or not mean < _LARGEST_MEAN:
            what = f"a step of 2**{highest / STEPS_PER_OCTAVE:.4g} and a mean of {mean:.3g}"
            cure = f"Steps are at most 2**{MAX_EXPONENT // STEPS_PER_OCTAVE}, means below {_LARGEST_MEAN:.3g}"
            raise Malformed(what, cure=cure)


@cache
def _mantissas() -> Float32[np.ndarray, " octave"]:
    return np.array(
        [float(Decimal(2) ** (Decimal(i) / STEPS_PER_OCTAVE)) for i in range(STEPS_PER_OCTAVE)], np.float32
    )


def _times_power(numbers: Float32[np.ndarray, " n"], octaves: Exponents) -> Float32[np.ndarray, " n"]:
    """Numbers times 2**octaves, an integer within 1000, rounded once."""
    # The exponent field of a double: ldexp is ten times as slow.
    power = (octaves + 1023 << 52).view(np.float64)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and `Grid` refuses it
        return (numbers * power).astype(np.float32)


def step_size(exponent: Exponents) -> Float32[np.ndarray, " n"]:
    """2**(exponent / 64) in float32.

    >>> step_size(np.array([0, 64, -128])).tolist()
    [1.0, 2.0, 0.25]
    """
    return _times_power(_mantissas()[exponent & (STEPS_PER_OCTAVE - 1)], exponent >> _OCTAVE_LOG2)


def grain_of(n_tokens: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Quarter octaves from one level that may be sent to the next."""
    return np.where(n_tokens < _COARSE_TOKENS, 2, 1)


def levels_of(
    deviation: Float64[np.ndarray, " n"], step: Float32[np.ndarray, " n"], n_tokens: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """The levels of channels of this deviation."""
    return level_of(deviation / step, grain_of(n_tokens))


def mean_unit(
    level: Int64[np.ndarray, " n"], step: Float32[np.ndarray, " n"], n_tokens: Int64[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """What a mean is sent in multiples of: 2**(level / 4) steps, less the finer the more tokens pay for it.

    A mean that is off costs bits in proportion to tokens; it is sent to a share of about 2.8 / sqrt(tokens) of the
    deviation, and never finer than a quarter of a step.
    """
    n_bits = (n_tokens.astype(np.float64).view(np.int64) >> 52) - 1022
    share = np.maximum(n_bits - 4, 0) >> 1
    octaves = np.maximum(np.where(level == SILENT, -2, (level >> 2) - share), -2)
    return _times_power(step, octaves)


def class_level(level: Exponents, token_class: Exponents) -> Exponents:
    """The level of a channel in a precision class."""
    return np.maximum(level - CLASS_LEVEL * (token_class - 1), LOWEST)


def whole(
    numbers: Float32[np.ndarray, "rows tokens"],
    mean: Float32[np.ndarray, " rows"],
    step: Float32[np.ndarray, " rows"],
) -> Float32[np.ndarray, "rows tokens"]:
    """Numbers in steps from their means, rounded half to even."""
    return np.rint((numbers - mean[:, None]) * (np.float32(1) / step)[:, None])


def centre(
    numbers: Int64[np.ndarray, "*shape"], level: Int64[np.ndarray, "*shape"]
) -> Float32[np.ndarray, "*shape"]:
    """Where in its cell a whole number is decoded to: the centroid if it is small, the middle otherwise."""
    small = (np.abs(numbers) < N_CENTROIDS) & (level - LOWEST < len(tables().centroid)) & (level != SILENT)
    table = np.where(small, level - LOWEST, 0)
    inner = tables().centroid[table, np.where(small, np.abs(numbers), 0)] * np.sign(numbers)
    return np.where(small, inner, numbers).astype(np.float32)


def profile_level(deviation_exponent: Exponents, exponent: Exponents) -> Exponents:
    """The level of a channel whose deviation is 2**(deviation_exponent / 64), in integers."""
    quarter = STEPS_PER_OCTAVE // 4
    return np.clip((deviation_exponent - exponent + quarter // 2) // quarter, LOWEST, MAX_LEVEL)
