"""Which codecs a map may be used behind: those that it was fitted under, and what lies between them."""

from collections.abc import Sequence
from typing import Any

from kvferry.spec import read_call

_FREE = ("zstd",)
"""Options that leave the numbers as they are."""


def covers(coded_with: Sequence[str], spec: str) -> bool:
    """Whether a codec gives numbers like those fitted under.

    That is: the same codec; at a step between two that were fitted under; or, as `raw` at fp32 under any `raw`, finer.

    >>> covers(("raw(dtype=float16)",), "raw(dtype=float32)"), covers(("raw(dtype=float16)",), "int(bits=4)")
    (True, False)
    >>> covers(("ecsq(step=-64)", "ecsq(step=0)"), "ecsq(step=-20)"), covers(("ecsq(step=0)",), "ecsq(step=1)")
    (True, False)
    >>> covers(("ecsq(step=0)",), "ecsq(step=finest)")
    False
    """
    wanted, step = _split(spec)
    fitted = [_split(text) for text in coded_with]
    like = [known_step for known, known_step in fitted if known == wanted]
    if step is not None:
        steps = [known for known in like if isinstance(known, int)]
        return bool(steps) and isinstance(step, int) and min(steps) <= step <= max(steps)
    exact = wanted == ("raw", {"dtype": "float32"})
    return bool(like) or (exact and any(name == "raw" for (name, _), _ in fitted))


def _split(spec: str) -> tuple[tuple[str, dict[str, Any]], object]:
    """A codec without its step and what leaves the numbers as they are; and its step."""
    name, _, options = read_call(spec)
    step = options.pop("step", None)
    return (name, {key: value for key, value in options.items() if key not in _FREE}), step
