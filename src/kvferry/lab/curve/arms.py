"""What is sent under a cap: caches by any spec, and beside them text in every honest form.

A message is bytes before it is scored, whatever it holds. What the sender is told first, a question, counts too.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kvferry.errors import BudgetTooSmall
from kvferry.lab.arms import last_bytes
from kvferry.lab.curve.caps import Cap
from kvferry.lab.curve.room import Room
from kvferry.lab.curve.snippet import sentences, snippet
from kvferry.lab.curve.spec import Spec
from kvferry.session.message import Message, text_message
from kvferry.session.selecting import encode_sight

_HEADER = len(text_message(""))


@dataclass(frozen=True)
class Sent:
    """One item's message, or None where the cap cannot be met or the receiver would refuse.

    `request_bytes` is the question that the sender was told first. `smallest_bytes`: the cap that would have done,
    where one would. `kept`: the share of the slots that the message holds. `encode_ms`: selection and coding.
    """

    message: Message | None
    request_bytes: int = 0
    smallest_bytes: int | None = None
    kept: float | None = None
    encode_ms: float | None = None


Send = Callable[[Room, int, Cap], Sent]
"""What one item of a room becomes under a cap."""


@dataclass(frozen=True)
class Arm:
    """A way to send. Without `capped` it sends the same under any cap, and is measured once."""

    name: str
    family: str
    send: Send
    capped: bool = True
    spec: Spec | None = None

    @property
    def identity(self) -> str:
        """What two measurements must agree in to be of the same arm."""
        return self.name if self.spec is None else self.spec.identity

    @property
    def recipe(self) -> dict[str, str | int]:
        """For a point."""
        said: dict[str, str | int] = {"spec": self.name, "family": self.family}
        if self.spec is not None:
            said |= {"selector": self.spec.selector.brief(), "codec": self.spec.codec.agreed().brief()}
        return said


def nothing(room: Room, index: int, cap: Cap) -> Sent:
    return Sent(text_message(""))


def whole_text(room: Room, index: int, cap: Cap, *, compress: bool = False) -> Sent:
    return Sent(text_message(room.exam.contexts[index], compress=compress))


def text_end(room: Room, index: int, cap: Cap) -> Sent:
    """As many of its last bytes as the cap allows."""
    n_bytes = _text_room(cap)
    if n_bytes < 1:
        return Sent(None, smallest_bytes=_HEADER + 1)
    return Sent(text_message(last_bytes(room.exam.contexts[index], n_bytes)))


def question_text(room: Room, index: int, cap: Cap) -> Sent:
    """The question goes ahead, and the sentences come back that share its words."""
    text, asked = room.exam.contexts[index], _question_bytes(room, index)
    found = snippet(text, _question(room, index), _text_room(cap))
    if found is None:
        shortest = min(len(part.encode()) for part in sentences(text))
        return Sent(None, asked, _HEADER + shortest)
    return Sent(text_message(found), asked)


@torch.no_grad()
def cache(spec: Spec, room: Room, index: int, cap: Cap) -> Sent:
    """What the spec makes of the sender's cache."""
    asked = _question_bytes(room, index) if spec.selector.reads_question else 0
    sight, start = room.sights[index], time.perf_counter()
    try:
        message = encode_sight(spec.codec, spec.selector, sight, cap)
    except BudgetTooSmall as error:
        return Sent(None, asked, error.smallest_bytes)
    encode_ms = 1000 * (time.perf_counter() - start)
    if not room.road.covers(message):
        return Sent(None, asked)
    return Sent(message, asked, kept=message.frame.n_tokens / sight.kv.n_tokens, encode_ms=encode_ms)


def arms_of(specs: Sequence[Spec], *, questions: bool) -> list[Arm]:
    """Text first, then the specs; the snippet only where there are questions."""
    beside = [
        Arm("receiver_only", "control", nothing, capped=False),
        Arm("text", "text", whole_text, capped=False),
        Arm("text_zstd", "text", partial(whole_text, compress=True), capped=False),
        Arm("text_end", "text", text_end),
    ]
    asked = [Arm("question_text", "question text", question_text)] if questions else []
    return [*beside, *asked, *map(_of_cache, specs)]


def _of_cache(spec: Spec) -> Arm:
    return Arm(spec.name, spec.family, partial(cache, spec), spec=spec)


def _text_room(cap: Cap) -> int:
    return 1 << 30 if cap is None else max(cap - _HEADER, 0)


def _question(room: Room, index: int) -> str:
    questions = room.exam.questions
    return questions[index] if questions else ""


def _question_bytes(room: Room, index: int) -> int:
    return len(text_message(_question(room, index)))
