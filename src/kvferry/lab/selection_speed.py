"""`kvferry bench select`: how long selecting takes, beside the sender's own prefill, on random weights of a known size.

Selecting is everything from a finished prefill to a plan: scores, the codec's menu, the sizes that are asked of it.
Evidence (queries, attention) is recorded by the prefill, so prefills are timed with and without it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar, cast

import torch

from kvferry.codec import CODECS
from kvferry.kv import Role
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.scores import scores_of
from kvferry.models.tokens import Row, encode_rows, pad
from kvferry.models.untrained import untrained_qwen
from kvferry.select import SELECTORS
from kvferry.select.contract import Selector
from kvferry.select.sight import alone
from kvferry.session.selecting import plan_of

T = TypeVar("T")
SPECS = (
    "lagrangian | ecsq",
    "lagrangian | mixed",
    "vnorm(proportion=0.25) | ecsq",
    "keydiff(proportion=0.25) | int(bits=4)",
    "snapkv(proportion=0.25) | ecsq",
    "expected_attention(proportion=0.25) | ecsq",
)


@dataclass(frozen=True)
class Settings:
    """What is timed. The cap is for all specs."""

    tokens: int = 2048
    max_bytes: int = 1 << 20
    repeats: int = 3
    specs: tuple[str, ...] = SPECS


def run_selection(settings: Settings, on_point: Callable[[Point], None] = lambda point: None) -> list[Point]:
    """A point for each spec: milliseconds of prefill and of selecting, and the share."""
    model = untrained_qwen(settings.tokens + 1)
    points = []
    for spec in settings.specs:
        points.append(_timed(model, spec, settings))
        on_point(points[-1])
    return points


def _timed(model: Model, spec: str, settings: Settings) -> Point:
    selector_text, _, codec_text = spec.partition("|")
    selector, codec = SELECTORS.parse(selector_text.strip()), CODECS.parse(codec_text.strip())
    tokens = pad([_row(model, settings.tokens)])
    prefill_ms, _ = _timed_call(1, lambda: capture(model, tokens))
    evidence_ms, seen = _timed_call(1, lambda: capture(model, tokens, selector.needs))
    sight = replace(alone(seen.kv), evidence=seen.evidence, scores=scores_of(model))
    select_ms, _ = _timed_call(settings.repeats, lambda: plan_of(codec, selector, sight, settings.max_bytes))
    times = {"prefill_ms": prefill_ms, "with_evidence_ms": evidence_ms, "select_ms": select_ms}
    return _point(spec, selector, settings, times)


def _row(model: Model, n_tokens: int) -> Row:
    """So many tokens of some text."""
    text = " ".join(f"Number {number} is kept in room {number * 7 % 101}." for number in range(n_tokens))
    ((ids, spans),) = encode_rows(model.tokenizer, [text], [Role.TEXT])
    return ids[:n_tokens], spans.take(torch.arange(n_tokens).numpy())


def _timed_call(repeats: int, call: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds of the median call, and what the last one gave."""
    taken: list[float] = []
    result = None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        taken.append((time.perf_counter() - start) * 1e3)
    return median(taken), cast("T", result)


def _point(spec: str, selector: Selector, settings: Settings, latency_ms: dict[str, float]) -> Point:
    return Point(
        arm=selector.name,
        recipe=spec,
        sender="Qwen2.5-0.5B, random weights",
        receiver="",
        task=f"select from {settings.tokens} tokens",
        split="none",
        n=settings.repeats,
        seed=0,
        metrics={"share_of_prefill": latency_ms["select_ms"] / latency_ms["prefill_ms"]},
        n_bytes={"cap": float(settings.max_bytes)},
        latency_ms=latency_ms,
    )


def sheet(points: Sequence[Point]) -> Sheet:
    """One row a spec."""
    return Sheet(
        f"Selecting, {points[0].task}, {torch.get_num_threads()} threads",
        ("", "prefill ms", "with evidence", "select ms", "share"),
        tuple(_cells(point) for point in points),
        "share: of selecting in the plain prefill; medians of one process",
    )


def _cells(point: Point) -> tuple[str, ...]:
    times = (f"{point.latency_ms[name]:.0f}" for name in ("prefill_ms", "with_evidence_ms", "select_ms"))
    return (str(point.recipe), *times, f"{point.metrics['share_of_prefill'] or 0.0:.1%}")
