"""A measured part on the grid of its own statistics, which are sent with it."""

import numpy as np
from jaxtyping import Float32, Int64

from kvferry.codec.ecsq.grid import MAX_EXPONENT, SILENT, Grid, levels_of, mean_unit, step_size
from kvferry.codec.ecsq.measured import Measured
from kvferry.codec.ecsq.side import Side, code_levels, scaled_mean
from kvferry.errors import UsageError
from kvferry.wire.fields import STEPS_PER_OCTAVE

_LARGEST_MEAN = 1 << 30

Channels = Int64[np.ndarray, " channels"]


def own_side(measured: Measured, exponent: Channels) -> tuple[Side, Grid]:
    """What is sent of each channel of a part whose steps have these exponents, and what `grid_of` makes of it."""
    part, n_tokens = measured.part, measured.part.n_tokens
    if exponent.max(initial=0) > MAX_EXPONENT:
        what = f"numbers that need a step of 2**{exponent.max() / STEPS_PER_OCTAVE:.4g}"
        raise UsageError(what, cure=f"Use raw: steps are at most 2**{MAX_EXPONENT // STEPS_PER_OCTAVE}")
    step = step_size(exponent)
    level = levels_of(measured.deviation, step, n_tokens)
    level[_silent(measured, step)] = SILENT
    unit = mean_unit(level, step, n_tokens)
    mean = np.rint(measured.mean / unit)
    largest = float(np.abs(mean).max(initial=0))
    if not largest < _LARGEST_MEAN:
        what = f"a mean of {largest:.3g} units, the limit is {_LARGEST_MEAN}"
        raise UsageError(what, cure="Use a coarser step, or raw")
    side = Side(code_levels(level, n_tokens), mean.astype(np.int64), part.size, part.counts)
    return side, Grid(exponent, step, level, scaled_mean(side.mean, unit))


def _silent(measured: Measured, step: Float32[np.ndarray, " channels"]) -> Int64[np.ndarray, " some"]:
    """The channels whose numbers all round to 0 about the mean that a silent channel would have."""
    near = np.flatnonzero(measured.high - measured.low < 1.5 * step)
    if not len(near):
        return near
    one, n_tokens = step[near], measured.part.n_tokens[near]
    unit = mean_unit(np.full_like(near, SILENT), one, n_tokens)
    units = np.rint(measured.mean[near] / unit)
    fits = np.abs(units) < _LARGEST_MEAN
    mean = scaled_mean(np.where(fits, units, 0).astype(np.int64), unit)
    inverse = np.float32(1) / one
    low, high = (np.rint((end[near] - mean) * inverse) for end in (measured.low, measured.high))
    return near[fits & (low == 0) & (high == 0)]
