"""A measured part on the grid of its own statistics, which are sent with it."""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from kvferry.codec.ecsq.grid import MAX_EXPONENT, OCTAVE, SILENT, levels_of, mean_unit, step_size
from kvferry.codec.ecsq.measured import Measured
from kvferry.codec.ecsq.side import Side, code_levels, scaled_mean
from kvferry.errors import UsageError

_LARGEST_MEAN = 1 << 30

Channels = Int64[np.ndarray, " channels"]


def own_side(measured: Measured, exponent: Channels) -> Side:
    """What is sent of each channel of a part whose steps have these exponents."""
    part, n_tokens = measured.part, measured.part.n_tokens
    if exponent.max(initial=0) > MAX_EXPONENT:
        what = f"numbers that need a step of 2**{exponent.max() / OCTAVE:.4g}"
        raise UsageError(what, cure=f"Use raw: steps are at most 2**{MAX_EXPONENT // OCTAVE}")
    level = levels_of(measured.deviation, exponent, n_tokens)
    level = np.where(_silent(measured, exponent), SILENT, level)
    mean = _units(measured, level, exponent)
    largest = float(np.abs(mean).max(initial=0))
    if not largest < _LARGEST_MEAN:
        what = f"a mean of {largest:.3g} units, the limit is {_LARGEST_MEAN}"
        raise UsageError(what, cure="Use a coarser step, or raw")
    return Side(code_levels(level, n_tokens), mean.astype(np.int64), part.size, part.counts)


def _silent(measured: Measured, exponent: Channels) -> Bool[np.ndarray, " channels"]:
    """Whether all numbers of a channel round to 0 about the mean that a silent channel would have."""
    level = np.full_like(exponent, SILENT)
    units = _units(measured, level, exponent)
    fits = np.abs(units) < _LARGEST_MEAN
    whole = np.where(fits, units, 0).astype(np.int64)
    mean = scaled_mean(whole, level, exponent, measured.part.n_tokens)
    inverse = np.float32(1) / step_size(exponent)
    low, high = (np.rint((end - mean) * inverse) for end in (measured.low, measured.high))
    return fits & (low == 0) & (high == 0)


def _units(measured: Measured, level: Channels, exponent: Channels) -> Float64[np.ndarray, " channels"]:
    return np.rint(measured.mean / mean_unit(level, exponent, measured.part.n_tokens))
