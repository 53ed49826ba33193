"""`kvferry bench refine`: does it save bytes to send a part first, and more only where the answer is a close call?

A sender and a receiver of one model. Of each item's `progressive` message the receiver answers from a first part, from
one and two parts more, and from all; every rule of when to ask is then judged on the same answers. Margins are chosen
on dev items: the least mean bytes at no fewer right answers than with everything. Test items are reported, in twins.
Bytes are those of the link: pieces, and every request and report as JSON in its frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from jaxtyping import Float64, Int64

from kvferry.codec import CODECS
from kvferry.codec.progressive import Progressive
from kvferry.errors import UsageError
from kvferry.lab.items import Batch, Worlds, right
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet
from kvferry.metrics.paired import paired, wilson
from kvferry.models.load import load
from kvferry.session.message import Message, message_of
from kvferry.session.receiver import Receiver
from kvferry.session.refine import Asked, Patience, answer_so_far, more_message, piece
from kvferry.session.sender import Sender
from kvferry.wire import HEADER_BYTES, MessageKind, SegmentType, json_frame, packed_bytes, unpack_prefix

_MAX_NEW_TOKENS = 12
_DEV_SEED = 1_000
"""Added to the seed of the test items: contexts of the two never meet."""
_LEGEND = (
    "accuracy: whole answers right, with 95 % intervals (Wilson); bytes: mean of both directions, requests among them; "
    "more: items for which more was asked; against all: difference from sending everything, paired, with its 95 % "
    "interval and verdict; at once: every message cut to the mean bytes of the rule that dev items chose"
)


@dataclass(frozen=True)
class Settings:
    """What is measured. Bytes of the first part, and of each part that is asked for."""

    model: str = "llama"
    codec: str = "progressive(step=-32)"
    n_items: int = 500
    n_dev: int = 200
    first_bytes: int = 2500
    more_bytes: int = 1750
    max_rounds: int = 2
    n_facts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        codec = CODECS.parse(self.codec)
        if not isinstance(codec, Progressive):
            cure = "Give progressive, with any of its options"
            raise UsageError(f"messages of {codec.name} cannot be sent in parts", cure=cure)


@dataclass(frozen=True)
class Answers:
    """Per item, after the first part, after each round, and last with everything."""

    right: Int64[np.ndarray, "items stages"]
    margin: Float64[np.ndarray, "items stages"]
    n_bytes: Float64[np.ndarray, "items stages"]
    """Of both directions up to there; the last as one message without patience."""

    def under(self, margin: float) -> "Outcome":
        """What a rule makes of them."""
        close = self.margin[:, :-2] < margin
        rounds = np.cumprod(close, axis=1).sum(1)
        rows = np.arange(len(rounds))
        return Outcome(rounds, self.right[rows, rounds], self.n_bytes[rows, rounds])

    @property
    def everything(self) -> "Outcome":
        return Outcome(np.zeros(len(self.right), np.int64), self.right[:, -1], self.n_bytes[:, -1])


@dataclass(frozen=True)
class Outcome:
    """Per item: rounds, whether right, bytes of both directions."""

    rounds: Int64[np.ndarray, " items"]
    right: Int64[np.ndarray, " items"]
    n_bytes: Float64[np.ndarray, " items"]


def run_refine(settings: Settings, on_point: Callable[[Point], None] = lambda point: None) -> list[Point]:
    """First part alone, everything, and rules: the one that dev items choose, and some beside it."""
    worlds = Worlds(n_facts=settings.n_facts)
    batches = worlds.twins(settings.n_items, settings.seed)
    test = _answers(batches, settings)
    chosen = choose(_answers(worlds.twins(settings.n_dev, settings.seed + _DEV_SEED), settings))
    rule = test.under(chosen)
    cap = int(rule.n_bytes.mean())
    arms = {
        "first part": test.under(0.0),
        f"refine, margin {chosen:.2f}": rule,
        "refine, always": test.under(inf),
        "at once": at_once(batches, settings, settings.codec, cap),
        "at once, ecsq": at_once(batches, settings, "ecsq(step=-256)", cap),
        "everything": test.everything,
    }
    points = []
    for arm, outcome in arms.items():
        points.append(_point(arm, outcome, test.everything, settings))
        on_point(points[-1])
    return points


def at_once(batches: Sequence[Batch], settings: Settings, codec: str, cap: int) -> Outcome:
    """Each message within a cap, request included, and no second part."""
    sender = Sender(load(settings.model), codec)
    receiver, hits, sizes = Receiver(sender.model), list[int](), list[float]()
    for batch in batches:
        requests = [_plain_request(question) for question in batch.questions]
        caches = sender.capture(batch.contexts).sequences()
        messages = [sender.encode(kv, cap - n)[0] for kv, n in zip(caches, requests, strict=True)]
        replies = receiver.answer_batch(messages, batch.questions, max_new_tokens=_MAX_NEW_TOKENS)
        hits += right([reply.text for reply in replies], batch.answers).tolist()
        sizes += [float(len(message) + n) for message, n in zip(messages, requests, strict=True)]
    return Outcome(np.zeros(len(hits), np.int64), np.array(hits), np.array(sizes))


def choose(dev: Answers) -> float:
    """The margin of fewest mean bytes among those with no fewer right answers than everything has."""
    tried = [0.0, *np.quantile(dev.margin[:, 0], np.arange(1, 20) / 20).tolist(), inf]
    wanted = dev.right[:, -1].mean()
    outcomes = [(dev.under(margin), margin) for margin in tried]
    found = [(one.n_bytes.mean(), margin) for one, margin in outcomes if one.right.mean() >= wanted]
    return float(min(found)[1]) if found else inf


def _answers(batches: Sequence[Batch], settings: Settings) -> Answers:
    sender = Sender(load(settings.model), CODECS.parse(settings.codec))
    receiver = Receiver(sender.model)
    parts = [_batch(sender, receiver, batch, settings) for batch in batches]
    return Answers(
        *(np.concatenate([getattr(one, name) for one in parts]) for name in ("right", "margin", "n_bytes"))
    )


def _batch(sender: Sender, receiver: Receiver, batch: Batch, settings: Settings) -> Answers:
    messages = sender.read_batch(batch.contexts)
    _require_chunk(messages, settings.first_bytes)
    cuts = [
        _cuts(message, question, settings)
        for message, question in zip(messages, batch.questions, strict=True)
    ]
    found: list[tuple[np.ndarray, list[float]]] = []
    for stage in range(settings.max_rounds + 2):
        frames = [
            unpack_prefix(message.data[: ends[stage][0]]).frame
            for message, ends in zip(messages, cuts, strict=True)
        ]
        scored = answer_so_far(receiver, frames, batch.questions, max_new_tokens=_MAX_NEW_TOKENS)
        hits = right([one.reply.text for one in scored], batch.answers)
        found.append((hits, [one.margin for one in scored]))
    return Answers(
        np.stack([hits for hits, _ in found], 1),
        np.array([margins for _, margins in found]).T,
        np.array([[float(n_bytes) for _, n_bytes in ends] for ends in cuts]),
    )


def _require_chunk(messages: Sequence[Message], first_bytes: int) -> None:
    """Without a chunk there is nothing to answer from."""
    smallest = max(map(_first_chunk_ends, messages))
    if first_bytes < smallest:
        what = f"a first part of {first_bytes} bytes ends within the first chunk"
        raise UsageError(what, cure=f"Give at least {smallest}")


def _first_chunk_ends(message: Message) -> int:
    segments = message.frame.segments
    n = [segment.type for segment in segments].index(SegmentType.PAYLOAD) + 1
    return HEADER_BYTES + packed_bytes([len(one.body) for one in segments[:n]]) - packed_bytes([])


def _cuts(message: Message, question: str, settings: Settings) -> list[tuple[int, int]]:
    """Where each stage ends, and the bytes of both directions up to there, replies aside; last, all of it."""
    patience = Patience(1.0, settings.more_bytes, settings.max_rounds)
    whole = unpack_prefix(message.data[:-1]).n_bytes_used
    request = len(Asked(question, _MAX_NEW_TOKENS, patience, whole).message())
    at = len(piece(message.data, 0, settings.first_bytes))
    ends = [(at, request + at)]
    for _ in range(settings.max_rounds):
        wanted = min(settings.more_bytes, whole - at)
        if wanted:
            request += len(more_message(at, wanted))
            at += len(piece(message.data, at, wanted))
        ends.append((at, request + at))
    return [*ends, (len(message.data), len(message.data) + _plain_request(question))]


def _plain_request(question: str) -> int:
    content = {"questions": [question], "max_new_tokens": _MAX_NEW_TOKENS}
    return len(message_of(json_frame(MessageKind.REQUEST, content)))


def _point(arm: str, outcome: Outcome, everything: Outcome, settings: Settings) -> Point:
    hits, n_bytes, rounds = outcome.right, outcome.n_bytes, outcome.rounds
    against = paired(hits, everything.right, block=2)
    saved = paired(n_bytes, everything.n_bytes, block=2)
    metrics: dict[str, float | None] = {
        "accuracy": float(hits.mean()),
        "asked_for_more": float((rounds > 0).mean()),
        "rounds": float(rounds.mean()),
        "accuracy_less_everything": against.difference,
        "bytes_less_everything": saved.difference,
    }
    return Point(
        arm=arm,
        recipe={
            "codec": settings.codec,
            "first_bytes": settings.first_bytes,
            "more_bytes": settings.more_bytes,
            "max_rounds": settings.max_rounds,
            "verdict": {"a better": "better", "b better": "worse"}.get(against.verdict, against.verdict),
        },
        sender=settings.model,
        receiver=settings.model,
        task=f"worlds, {settings.n_facts} facts",
        split="test",
        n=len(hits),
        seed=settings.seed,
        metrics=metrics,
        ci95={
            "accuracy": wilson(int(hits.sum()), len(hits)),
            "accuracy_less_everything": against.ci95,
            "bytes_less_everything": saved.ci95,
        },
        n_bytes={"link": float(n_bytes.mean())},
    )


def sheet(points: Sequence[Point]) -> Sheet:
    """A row for each rule."""
    first = points[0]
    columns = ("", "accuracy", "bytes", "more", "accuracy against all", "verdict", "bytes against all")
    title = f"Refining, {first.sender} to itself: {first.task}, {first.n} items"
    return Sheet(title, columns, tuple(map(_row, points)), _LEGEND)


def _row(point: Point) -> tuple[str, ...]:
    low, high = point.ci95["accuracy"] or (0.0, 0.0)
    worse, better = point.ci95["accuracy_less_everything"] or (0.0, 0.0)
    recipe = point.recipe if isinstance(point.recipe, dict) else {}
    return (
        point.arm,
        f"{point.accuracy:.3f} ({low:.3f} to {high:.3f})",
        f"{point.n_bytes['link']:.0f}",
        f"{100 * (point.metrics['asked_for_more'] or 0):.0f} %",
        f"{point.metrics['accuracy_less_everything'] or 0:+.3f} ({worse:+.3f} to {better:+.3f})",
        str(recipe["verdict"]),
        f"{point.metrics['bytes_less_everything'] or 0:+.0f}",
    )
