"""The most memory that a piece of work held, as Linux counts it."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float | None]]:
    """A list whose one member, after the block, is the peak in MB above what was held before.

    None on systems that do not tell.
    """
    peak: list[float | None] = [None]
    _give_back()
    before = _resident("VmRSS") if _reset() else None
    yield peak
    highest = _resident("VmHWM")
    if before is not None and highest is not None:
        peak[0] = (highest - before) / 1e3


def _give_back() -> None:
    """Freed memory to the system, so that it does not hide what is taken next; only glibc has a call for it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    """Let the high-water mark start anew."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> float | None:
    """kB of one line of the process's status."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return float(found[0]) if found else None
