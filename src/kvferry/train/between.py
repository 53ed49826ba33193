"""Steps between those that a recipe names: a contract covers them all, so training draws them.

A map that only ever saw some steps learns their very lattices: right in 98 % at steps 128 and 192, it was right in 65 %
at 160.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from kvferry.codec import Codec
from kvferry.codec.ecsq import Ecsq


def drawn(codecs: Sequence[Codec], index: int, chance: Random) -> Codec:
    """One of the codecs, `ecsq` at any step from the next finer one of its kind, evenly, to its own.

    >>> coarse = drawn([Ecsq(step=0), Ecsq(step=64)], 1, Random(0))
    >>> 0 <= coarse.step <= 64, drawn([Ecsq(step=0), Ecsq(step=64)], 0, Random(0)).step
    (True, 0)
    """
    codec = codecs[index]
    if not isinstance(codec, Ecsq):
        return codec
    finer = (one.step for one in codecs if isinstance(one, Ecsq) and replace(one, step=codec.step) == codec)
    low = max((step for step in finer if step < codec.step), default=codec.step)
    return replace(codec, step=chance.randint(low, codec.step))
