"""A measured part on the grid of its own statistics, which are sent with it."""

import numpy as np
from jaxtyping import Float32, Int64

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
    step = step_size(exponent)
    level = levels_of(measured.deviation, step, n_tokens)
    level[_silent(measured, step)] = SILENT
    mean = np.rint(measured.mean / mean_unit(level, step, n_tokens))
    largest = float(np.abs(mean).max(initial=0))
    if not largest < _LARGEST_MEAN:
        what = f"a mean of {largest:.3g} units, the limit is {_LARGEST_MEAN}"
        raise UsageError(what, cure="Use a coarser step, or raw")
    return Side(code_levels(level, n_tokens), mean.astype(np.int64), part.size, part.counts)


def _silent(measured: Measured, step: Float32[np.ndarray, " channels"]) -> Int64[np.ndarray, " some"]:
    """The channels whose numbers all round to 0 about the mean that a silent channel would have."""
    near = np.flatnonzero(measured.high - measured.low < 1.5 * step)
    if not len(near):
        return near
    one, n_tokens = step[near], measured.part.n_tokens[near]
    level = np.full_like(near, SILENT)
    units = np.rint(measured.mean[near] / mean_unit(level, one, n_tokens))
    fits = np.abs(units) < _LARGEST_MEAN
    mean = scaled_mean(np.where(fits, units, 0).astype(np.int64), level, one, n_tokens)
    inverse = np.float32(1) / one
    low, high = (np.rint((end[near] - mean) * inverse) for end in (measured.low, measured.high))
    return near[fits & (low == 0) & (high == 0)]
