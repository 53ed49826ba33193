"""What comes back, and how long each stage took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Reply:
    """An answer. `stages_ms`: milliseconds of each stage; in a batch, the batch's time over its size."""

    text: str
    ended_by: str
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class Stopwatch:
    """Times stages around the path, never inside it; waits for the device at the borders."""

    device: torch.device
    stages_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + elapsed_ms

    def shared_by(self, n: int) -> dict[str, float]:
        """The times divided over `n` items of one batch."""
        return {name: ms / max(n, 1) for name, ms in self.stages_ms.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
