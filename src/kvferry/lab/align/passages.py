"""Passages of a story: a prefix that travels and a suffix that is predicted, cut where both tokenizers can be cut."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import inf
from statistics import median

from kvferry.lab.align.stories import stories
from kvferry.models.load import Model
from kvferry.models.tokens import encode
from kvferry.train.examples import Example, Split
from kvferry.train.sources.fitting import counted_alike

SUFFIX_CHARS = 125
LONG_SUFFIX_CHARS = 250
"""In training, where the receiver has positions for it: more of what is read behind a cache, more to learn from."""
_PREFIX_CHARS = (480, 400, 122)
_NEAR = 40  # a cut is at most so many characters away from where it is wished
_ROOM = 2  # positions for the head
_DRIFT = (
    24  # positions by which slots of another tokenizer may stand further on than the receiver's own tokens
)
_N_PROBED = 50


@dataclass(frozen=True)
class Passage:
    """`prefix[:tail]` may be sent with `prefix[tail:]` as text; `suffix` is scored from its second token on."""

    prefix: str
    suffix: str
    tail: int


@dataclass(frozen=True)
class Pair:
    """Two models, and the source of passages that both can hold. A `Source` for fits."""

    sender: Model
    receiver: Model
    prefix_chars: int
    tail_chars: int

    @property
    def name(self) -> str:
        return "stories"

    @property
    def models(self) -> tuple[Model, Model]:
        return self.sender, self.receiver

    def passages(self, split: Split, n: int) -> list[Passage]:
        """The first `n` passages of a split, fewer where there are no more."""
        return list(_first(self, split, n))

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        """For fits: the passages of dev and test over and over; of train, windows that begin anywhere."""
        order = random.Random(f"{split}{seed}")
        if split == "train":
            yield from _windows(self, order)
        found = self.passages(split, 10**6)
        while True:
            yield from (_example(passage) for passage in order.sample(found, len(found)))


def pair_of(sender: Model, receiver: Model) -> Pair:
    """The longest prefix for which both models have positions."""
    probe = stories("train")[:_N_PROBED]
    for n_chars in _PREFIX_CHARS:
        if all(_fits(model, probe, n_chars + SUFFIX_CHARS) for model in (sender, receiver)):
            return Pair(sender, receiver, n_chars, 64 if n_chars > 200 else 32)
    return Pair(sender, receiver, _PREFIX_CHARS[-1], 32)


def _example(passage: Passage) -> Example:
    return Example(passage.prefix, ((passage.suffix, True),))


def _windows(pair: Pair, order: random.Random) -> Iterator[Example]:
    """Endless passages of train stories; half of them start where the story does, as those of test do."""
    told = stories("train")
    while True:
        story = _with_gaps(pair, order.choice(told))
        latest = max(len(story) - pair.prefix_chars - SUFFIX_CHARS, 0)
        start = order.choice((0, order.randint(0, latest)))
        found = _passage(pair, story if not start else _from_word(story[start:]), LONG_SUFFIX_CHARS)
        if found is not None:
            yield _example(found)


def _with_gaps(pair: Pair, story: str) -> str:
    """Paragraph breaks as both models know them."""
    return story if all(_knows_newline(model) for model in pair.models) else story.replace("\n", " ")


def _fits(model: Model, texts: Iterable[str], n_chars: int) -> bool:
    """Whether the usual text of so many characters has room in the model."""
    return median(_room_left(model, text[:n_chars]) for text in texts) >= 0


def _room_left(model: Model, text: str) -> float:
    limit = model.geometry.max_positions
    return inf if limit is None else limit - _ROOM - encode(model.tokenizer, [text]).ids.shape[1]


@cache
def _knows_newline(model: Model) -> bool:
    unknown = model.tokenizer.unk_token_id
    return unknown is None or unknown not in encode(model.tokenizer, ["a\nb"]).ids[0].tolist()


@lru_cache(maxsize=32)
def _first(pair: Pair, split: Split, n: int) -> tuple[Passage, ...]:
    found: list[Passage] = []
    for passage in _all(pair, split):
        if len(found) == n:
            break
        found.append(passage)
    return tuple(found)


def _all(pair: Pair, split: Split) -> Iterator[Passage]:
    """The beginning of each story; where prefixes are short, several windows of it."""
    n_chars = pair.prefix_chars + SUFFIX_CHARS + _NEAR
    for story in stories(split):
        text = _with_gaps(pair, story)
        starts = range(0, 1 if pair.prefix_chars > 200 else len(text) - n_chars, n_chars)
        windows = (text[start:].lstrip()[: n_chars + _NEAR] for start in starts)
        yield from filter(None, (_passage(pair, _from_word(window), SUFFIX_CHARS) for window in windows))


def _from_word(window: str) -> str:
    """A window in the middle of a story begins with a whole word."""
    return window if window[:1].isupper() else window.partition(" ")[2]


def _passage(pair: Pair, text: str, suffix_chars: int) -> Passage | None:
    """The passage at the beginning of a text, with at most so long a suffix; None where it has no room."""
    text = text[: pair.prefix_chars + _NEAR + suffix_chars]
    cut = _cut(pair, text, pair.prefix_chars)
    tail = _cut(pair, text[:cut], pair.prefix_chars - pair.tail_chars) if cut else None
    if not cut or not tail or len(text) < cut + SUFFIX_CHARS:
        return None
    long = _room_left(pair.receiver, text[: cut + suffix_chars]) >= _drift(pair)
    room = suffix_chars if long else SUFFIX_CHARS
    passage = Passage(text[:cut], text[cut : cut + room], tail)
    whole = passage.prefix + passage.suffix
    enough = _room_left(pair.sender, passage.prefix) >= 0 and _room_left(pair.receiver, whole) >= _drift(pair)
    return passage if enough else None


@cache
def _drift(pair: Pair) -> int:
    probe = [story[: pair.prefix_chars] for story in stories("train")[:_N_PROBED]]
    return 0 if counted_alike(pair.sender, pair.receiver, probe) else _DRIFT


def _cut(pair: Pair, text: str, near: int) -> int | None:
    """A place near `near`, before a word if possible, where either tokenizer reads the halves as it reads the whole."""
    wholes = [(model, encode(model.tokenizer, [text])) for model in pair.models]
    borders = set.intersection(*(set(tokens.spans[0].start.tolist()) for _, tokens in wholes))
    close = [place for place in borders if abs(place - near) <= _NEAR]
    for place in sorted(close, key=lambda place: (text[place] != " ", abs(place - near))):
        if all(_reads_alike(model, text, place, tokens.ids[0].tolist()) for model, tokens in wholes):
            return place
    return None


def _reads_alike(model: Model, text: str, place: int, whole: list[int]) -> bool:
    halves = (encode(model.tokenizer, [half]).ids[0].tolist() for half in (text[:place], text[place:]))
    return [number for half in halves for number in half] == whole
