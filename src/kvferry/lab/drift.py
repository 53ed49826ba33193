"""Measured against analytic bytes: does a message take what its formula says, and where do the others go?

Measured is the length of the message. Analytic is the codec's own formula, codes and scales without any header, as
papers count. The difference, the drift, is what a paper's number leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.codec import Codec
from kvferry.codec.estimate import Estimate, estimate
from kvferry.errors import UsageError
from kvferry.kv import KV
from kvferry.lab.items import BATCH, Worlds
from kvferry.models.load import public_name
from kvferry.session.message import Message
from kvferry.session.sender import Sender
from kvferry.session.survey import survey

MAX_DRIFT = 0.15
"""Above it a formula is no longer a fair account of the message."""
DEFAULT_CODECS = (
    "raw",
    "raw(float16)",
    "int(8)",
    "int(4)",
    "int(4, centred=True)",
    "int(4, zstd=3)",
    "nf4",
    "fp8",
    "ecsq",
)
_INDICES = frozenset({"TOKENS", "POSITIONS", "CLASSES"})
_PARTS = ("indices", "payload", "scales", "headers")


@dataclass(frozen=True)
class Spread:
    """Of the messages of one codec."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True)
class Drift:
    """One codec over `n` messages of one sender.

    `drift`: mean measured over mean analytic bytes, less 1; None where the codec has no formula. `breakdown`: mean
    bytes of indices (which tokens, where, how finely), payload, scales and headers (everything else); they add up to
    the mean measured bytes. A second stage shortens payload and scales together; they are then split by the formula.
    """

    sender: str
    codec: str
    n: int
    measured: Spread
    analytic: Spread | None
    drift: float | None
    breakdown: dict[str, float]

    @property
    def flagged(self) -> bool:
        return self.drift is not None and abs(self.drift) > MAX_DRIFT


def contexts(n: int, seed: int = 0) -> list[str]:
    """Task texts of the zoo, dev split."""
    if n < 1:
        raise UsageError(f"{n} contexts", cure="Measure at least one")
    return Worlds().others(n, seed)


def drifts(sender: Sender, codecs: Sequence[Codec], texts: Sequence[str]) -> list[Drift]:
    """What each codec makes of the same texts."""
    caches = [
        one
        for first in range(0, len(texts), BATCH)
        for one in sender.capture(texts[first : first + BATCH]).sequences()
    ]
    return [_drift(sender, codec, caches) for codec in codecs]


def _drift(sender: Sender, codec: Codec, caches: Sequence[KV]) -> Drift:
    reader = sender.with_codec(codec)
    messages = [message for kv in caches for message in reader.encode(kv)]
    estimates = [estimate(codec, kv) for kv in caches]
    found = [one for one in estimates if one is not None]
    analytic = _spread([one.payload + one.scales for one in found]) if found else None
    measured = _spread([len(message) for message in messages])
    parts = np.mean([_parts(*pair) for pair in zip(messages, estimates, strict=True)], axis=0)
    return Drift(
        sender=public_name(sender.model.name),
        codec=codec.brief(),
        n=len(messages),
        measured=measured,
        analytic=analytic,
        drift=measured.mean / analytic.mean - 1 if analytic else None,
        breakdown=dict(zip(_PARTS, parts.tolist(), strict=True)),
    )


def _spread(sizes: Sequence[float]) -> Spread:
    return Spread(float(np.mean(sizes)), float(np.median(sizes)), float(np.percentile(sizes, 95)))


def _parts(message: Message, formula: Estimate | None) -> tuple[float, ...]:
    """Bytes of `_PARTS`; heads of segments count as headers."""
    found, _ = survey(message.data)
    bodies = {"indices": 0.0, "payload": 0.0, "scales": 0.0}
    for row in found.segments:
        if row.name in _INDICES:
            bodies["indices"] += row.body_bytes
        elif row.name in ("PAYLOAD", "WEIGHTS"):
            bodies["payload" if row.name == "PAYLOAD" else "scales"] += row.body_bytes
    share = formula.scales / max(formula.scales + formula.payload, 1) if formula else 0.0
    scales = bodies["scales"] + share * bodies["payload"]
    payload = (1 - share) * bodies["payload"]
    return bodies["indices"], payload, scales, len(message) - sum(bodies.values())
