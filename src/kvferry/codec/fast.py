"""Inner loops, compiled by numba where it is installed: `pip install 'kvferry[fast]'`.

Rule 1: without numba everything works, in numpy or torch, and gives the same bytes and numbers.
Rule 2: nothing is compiled, and numba not imported, before the first call.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of a kernel: loops over numpy arrays, no objects. Kept on disk between runs."""
    import numba

    # Under test the import hook wraps every function to check its types; numba needs the bare one.
    return numba.njit(cache=True, nogil=True, fastmath=False)(inspect.unwrap(kernel))
