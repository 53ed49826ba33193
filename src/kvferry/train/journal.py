"""What a training did, step by step: JSON lines for programs, tensorboard for eyes."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from kvferry.errors import FolderError, MissingExtra
from kvferry.train.reports import Evaluation, Step

_CURE = "Name a file in a folder with space that you may write to"


@dataclass
class Journal:
    """A line for each step and evaluation, written through at once. Its methods are the callbacks of `Trainer`.

    A training that goes on from a checkpoint does some steps again: their old lines are dropped, and half a line too.
    `bounds` are limits of parts of the loss, such as the magnitude of what a map gives: outside of them a line
    `"event": "alarm"` follows, and the name joins `alarms`.
    """

    path: Path
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    alarms: set[str] = field(default_factory=set)
    _file: TextIO | None = None

    def step(self, report: Step) -> None:
        """Raises `FolderError` where the line cannot be written."""
        self._write("step", report.step, asdict(report))
        for name, (low, high) in self.bounds.items():
            if name in report.parts and not low <= report.parts[name] <= high:
                self.alarms.add(name)
                alarm = {
                    "step": report.step,
                    "name": name,
                    "value": report.parts[name],
                    "low": low,
                    "high": high,
                }
                self._write("alarm", report.step, alarm)

    def evaluation(self, report: Evaluation) -> None:
        """Raises `FolderError` where the line cannot be written."""
        self._write("evaluation", report.step, asdict(report))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been said by then
                self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, event: str, step: int, report: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, **_finite(report)}, allow_nan=False)
        try:
            self._file = self._file or self._open(step)
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise FolderError(f"cannot write to {self.path}: {error.strerror}", cure=_CURE) from None

    def _open(self, step: int) -> TextIO:
        """Keep what was said before this step."""
        kept = [json.dumps(row) for row in read_journal(self.path) if _before(row, step)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)
        return self.path.open("a", encoding="utf-8")


class Board:
    """The same for tensorboard, in a folder of its event files. Raises `MissingExtra` where it is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(folder))

    def step(self, report: Step) -> None:
        numbers = {"loss": report.loss, "gradient_norm": report.gradient_norm, "rate": report.learning_rate}
        for name, value in {**numbers, **report.parts}.items():
            self._writer.add_scalar(f"train/{name}", value, report.step)

    def evaluation(self, report: Evaluation) -> None:
        self._writer.add_scalar("dev/loss", report.loss, report.step)
        if report.averaged_loss is not None:
            self._writer.add_scalar("dev/averaged_loss", report.averaged_loss, report.step)

    def close(self) -> None:
        self._writer.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; empty where there is none, without the last one where that was cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _before(row: Mapping[str, Any], step: int) -> bool:
    """An evaluation after n steps stands before step number n."""
    return row["step"] < step or (row["event"] == "evaluation" and row["step"] == step > 0)


def _finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null."""
    parts = {name: _number(value) for name, value in report.get("parts", {}).items()}
    return {name: _number(value) for name, value in report.items()} | ({"parts": parts} if parts else {})


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
