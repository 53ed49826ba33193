"""The two ways through the entropy-coded codec: numpy alone, and loops compiled by numba."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvferry.codec import fast
from kvferry.codec.ecsq import shaping, source, stats
from kvferry.codec.entropy import rans, symbols
from kvferry.codec.progressive import rebuild

every_path = pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "numba"])


@contextmanager
def path(compiled: bool) -> Iterator[None]:
    """One of them inside; the test is skipped where numba is missing."""
    if compiled and not fast.available():
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for module in (shaping, source, stats, rans, symbols, rebuild):
            patch.setattr(module, "available", lambda: compiled)
        yield


def on_both(compute: Callable[[], object]) -> tuple[object, object]:
    """What each of them computes."""
    with path(compiled=False):
        plain = compute()
    with path(compiled=True):
        return plain, compute()
