"""`Point`: one measured result, and what must be known about the machine that measured it."""

import os
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from kvferry import __version__
from kvferry.metrics.paired import Interval

_DEPENDENCIES = ("torch", "transformers", "numpy")


@cache
def machine() -> dict[str, str | int]:
    """Processor, cores, operating system; no name, no path."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"kvferry": __version__} | {name: version(name) for name in _DEPENDENCIES}


@cache
def commit() -> str:
    """The commit of the checkout that the package runs from, "+" for changes on top; "unknown" elsewhere."""
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "-uno")
    root = _git("rev-parse", "--show-toplevel")
    if not head or not (Path(root or "/") / "src" / "kvferry").is_dir():
        return "unknown"
    return f"{head}+" if changes else head


@dataclass(frozen=True)
class Point:
    """How one arm did; on the bench, how one setting of a codec did.

    `recipe`: what is sent, in one line; on the bench `codec, spec, model, tokens`.
    `metrics`: accuracy, and follows_payload, the share of answers that are right for the text that the message was made
    of (None where a message is made of no text); `ci95` holds their Wilson intervals. `n_bytes`: mean bytes per item,
    of the message alone and of all that passed the link. `latency_ms`: medians of single items, by stage.
    A point is measured where it is made, so nobody says machine, versions and commit.
    """

    arm: str
    recipe: str | dict[str, str | int]
    sender: str
    receiver: str
    task: str
    split: str
    n: int
    seed: int
    metrics: dict[str, float | None]
    ci95: dict[str, Interval | None] = field(default_factory=dict)
    n_bytes: dict[str, float] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    commit: str = field(default_factory=commit)

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"] or 0.0


def _git(*words: str) -> str | None:
    """What git says about the folder of this file; None where there is no git, or no checkout."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """The processor's name as Linux and macOS tell it, else its architecture."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(errors="replace").splitlines() if info.is_file() else []:
        if line.lower().startswith(("model name", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
