"""Examples for which both models have positions: the others are passed over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from kvferry.errors import ContextTooLong
from kvferry.models.load import Model
from kvferry.models.tokens import encode
from kvferry.train.sources.example import Example, Source, Split

_PATIENCE, _N_PROBED = 200, 16
_SPARE = 1.25
"""Slots of another tokenizer stand where their text is on average, which may be further on than its tokens reach."""


@dataclass(frozen=True)
class Fitting:
    """A source without what would not fit: the sender reads contexts, the receiver contexts and what follows.

    Raises `ContextTooLong` where so many examples in a row do not fit that hardly any will.
    """

    source: Source
    sender: Model
    receiver: Model

    @property
    def name(self) -> str:
        return self.source.name

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        """Those of the source that fit, in its order."""
        return (example for example, _ in self._told(split, seed))

    def n_left_out(self, split: Split, seed: int, n: int) -> int:
        """How many do not fit and stand before the `n`-th that does."""
        return sum(missed for _, missed in islice(self._told(split, seed), n))

    def _told(self, split: Split, seed: int) -> Iterator[tuple[Example, int]]:
        """Those that fit, each with how many before it did not."""
        missed = 0
        for example in self.source.examples(split, seed):
            if self._fits(example):
                yield example, missed
                missed = 0
            elif (missed := missed + 1) == _PATIENCE:
                self._give_up(example)

    def _fits(self, example: Example) -> bool:
        after = "".join(text for text, _ in example.pieces)
        return _has_room(self.sender, 1.0, example.context) and _has_room(
            self.receiver, self._spare, example.context, after
        )

    @cached_property
    def _spare(self) -> float:
        probe = [example.context for example in islice(self.source.examples("train", 0), _N_PROBED)]
        return 1.0 if counted_alike(self.sender, self.receiver, probe) else _SPARE

    def _give_up(self, example: Example) -> None:
        limits = (self.sender.geometry.max_positions, self.receiver.geometry.max_positions)
        what = f"{_PATIENCE} texts in a row have no room, such as one of {len(example.context)} characters"
        raise ContextTooLong(
            f"{what}; sender and receiver have {limits} positions", cure="Fit on shorter texts"
        )


def counted_alike(sender: Model, receiver: Model, texts: Sequence[str]) -> bool:
    """Whether both models have as many tokens for each of the texts, as those of one tokenizer or of characters do."""
    ours, theirs = (encode(model.tokenizer, texts).lengths for model in (sender, receiver))
    return ours.tolist() == theirs.tolist()


def _has_room(model: Model, spare: float, *texts: str) -> bool:
    if model.geometry.max_positions is None:
        return True
    room = (model.geometry.max_positions - _head(model)) / spare
    # No token is shorter than a byte: most texts need no tokenizer to be found short enough.
    if sum(len(text.encode()) for text in texts) <= room:
        return True
    return sum(encode(model.tokenizer, [text]).ids.shape[1] for text in texts) <= room


def _head(model: Model) -> int:
    return model.head.ids.shape[1]
