"""A precision for each layer, chosen by hand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch

from kvferry.errors import BadSpec, UsageError
from kvferry.kv import Plan
from kvferry.select.graded import Graded, in_classes
from kvferry.select.sight import Budget, Sight

_OVERRIDE = re.compile(r"(\d+)(?:-(\d+))?:(\w+)")


@dataclass(frozen=True, repr=False)
class Schedule(Graded):
    """`default` for all layers but those of `overrides`, then `fp16` for the last `last_fp16`; later ones win.

    Layers are the sender's, for that is what a message carries: `table` says which of the receiver's read them.
    Which layers need what can be measured instead of presumed: see `qkvcomm` and `lagrangian`.

    >>> Schedule("int4", "0-1:int8; 3:int6", last_fp16=1).of_layers(6)
    ('int8', 'int8', 'int4', 'int6', 'int4', 'fp16')
    """

    name: ClassVar[str] = "schedule"
    default: str = "int8"
    overrides: str = ""
    last_fp16: int = 0

    def __post_init__(self) -> None:
        if self.last_fp16 < 0:
            raise BadSpec(f"schedule(last_fp16={self.last_fp16})", cure="Give how many layers, 0 or more")
        for scheme in (self.default, *(scheme for _, _, scheme in self._parsed())):
            self.class_of(scheme)
        if self.last_fp16:
            self.class_of("fp16")

    def of_layers(self, n_layers: int) -> tuple[str, ...]:
        """The scheme of each layer; `UsageError` for an override of layers that do not exist."""
        schemes = [self.default] * n_layers
        for first, last, scheme in self._parsed():
            if last >= n_layers:
                what = f"schedule: layers {first}-{last} of a sender with {n_layers}"
                raise UsageError(what, cure=f"Layers are the sender's, 0 to {n_layers - 1}")
            schemes[first : last + 1] = [scheme] * (last + 1 - first)
        if self.last_fp16 > n_layers:
            what = f"schedule: the last {self.last_fp16} layers of a sender with {n_layers}"
            raise UsageError(what, cure=f"last_fp16 is 0 to {n_layers}")
        return (*schemes[: n_layers - self.last_fp16], *["fp16"] * self.last_fp16)

    def plan(self, sight: Sight, budget: Budget | None = None) -> Plan:
        held = self.eligible(sight)
        classes = [self.class_of(scheme) for scheme in self.of_layers(len(held))]
        return self.within(in_classes(held, torch.tensor(classes, device=held.device).unsqueeze(1)), budget)

    def _parsed(self) -> list[tuple[int, int, str]]:
        """First layer, last layer and scheme of each override."""
        found = []
        for text in filter(None, (part.strip() for part in re.split("[;,]", self.overrides))):
            match = _OVERRIDE.fullmatch(text)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if match is None or last < first:
                cure = "Write FIRST-LAST:SCHEME or LAYER:SCHEME, joined by ; or ,"
                raise BadSpec(f"schedule(overrides={self.overrides!r}): {text!r}", cure=cure)
            found.append((first, last, match[3]))
        return found


def table(schemes: Sequence[str], sources: Sequence[Sequence[int]] = ()) -> str:
    """The schedule as text, a line for each run of layers; with the layer map, what each receiver layer reads too.

    `sources` says for each receiver layer the sender layers that it reads, as rules of layers give it
    (`kvferry.align.layer_map`). Raises `UsageError` for a source that the sender does not have.

    >>> print(table(("int4", "int4", "fp16"), sources=((), (0,), (1, 2))))
    sender 0-1: int4
    sender 2: fp16
    receiver 0 reads nothing
    receiver 1 reads sender 0: int4
    receiver 2 reads sender 1 2: int4 fp16
    """
    lines = [f"sender {run}: {scheme}" for run, scheme in _runs(schemes)]
    for layer, reads in enumerate(sources):
        if any(not 0 <= source < len(schemes) for source in reads):
            what = f"receiver layer {layer} reads sender layers {list(reads)}"
            raise UsageError(what, cure=f"Layers are the sender's, 0 to {len(schemes) - 1}")
        read = " ".join(map(str, reads))
        coded = " ".join(scheme for scheme, _ in groupby(schemes[source] for source in reads))
        lines.append(f"receiver {layer} reads " + (f"sender {read}: {coded}" if reads else "nothing"))
    return "\n".join(lines)


def _runs(schemes: Sequence[str]) -> list[tuple[str, str]]:
    """Runs of layers of one scheme, as `first-last`."""
    found = []
    for scheme, run in groupby(enumerate(schemes), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        name = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        found.append((name, scheme))
    return found
