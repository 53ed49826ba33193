"""Small seeded worlds: facts in plain English, and questions that nothing but the context can answer.

`make_item` gives one question, `make_twins` the same question in two worlds that answer it differently,
`make_document` a context with several questions, for training. The kinds of world are data, in `kinds`; `draw` fills
them in.

Splits cannot be mixed up: the CRC of a context decides its split; a world that falls into another is drawn again.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal, get_args

from kvferry.errors import UnknownName
from kvferry.models.zoo.draw import Table, World
from kvferry.models.zoo.kinds import Form

Split = Literal["train", "dev", "test"]
_SPLIT_OF_CRC: tuple[Split, ...] = ("test", "dev", "train", "train")


@dataclass(frozen=True)
class Item:
    """One question about one context; `choices` are the words that an answer of its type can be."""

    context: str
    question: str
    answer: str
    choices: tuple[str, ...]
    kind: str
    n_facts: int

    @property
    def prompt(self) -> str:
        return prompt(self.context, self.question)


@dataclass(frozen=True)
class Document:
    """A training text: a context, then several questions with their answers."""

    context: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces())

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text in order, each piece with whether it is an answer (its space and newline included)."""
        head = self.context
        for question, answer in zip(self.questions, self.answers, strict=True):
            yield prompt(head, question), False
            yield continuation(answer), True
            head = ""


def prompt(context: str, question: str) -> str:
    r"""What a plain model reads before it answers.

    >>> prompt("Ann has tea in Oslo.", "Where is the tea?")
    'Ann has tea in Oslo.\nQ: Where is the tea?\nA:'
    """
    return f"{context}\nQ: {question}\nA:" if context else f"Q: {question}\nA:"


def continuation(answer: str) -> str:
    """What a plain model writes after the prompt."""
    return f" {answer}\n"


def make_item(
    seed: int, *, kind: str = "place", n_facts: int = 8, n_fillers: int = 0, split: Split = "test"
) -> Item:
    """One question about a world of `n_facts` sentences, among `n_fillers` others.

    A `needle` holds one fact whatever `n_facts` says. Equal arguments give equal items, on any machine.

    >>> make_item(0, n_facts=2).context
    'Mia has pork in Nice. Cal has meat in Cork.'
    """
    world = World.of(kind, n_facts, n_fillers)
    items = (_item(world, rng) for rng in _draws("item", seed, world, split))
    return next(item for item in items if _split_of(item.context) == split)


def make_twins(
    seed: int, *, kind: str = "place", n_facts: int = 8, n_fillers: int = 0, split: Split = "test"
) -> tuple[Item, Item]:
    """Two worlds made of the same words in the same order of sentences, one question, two answers.

    The second world deals the words anew, except those that the question names; a single fact gets other words.

    >>> one, two = make_twins(0)
    >>> one.question == two.question, one.answer == two.answer
    (True, False)
    """
    world = World.of(kind, n_facts, n_fillers)
    pairs = (_twins(world, rng) for rng in _draws("twins", seed, world, split))
    return next(
        (one, two)
        for one, two in pairs
        if one.answer != two.answer and _split_of(one.context) == _split_of(two.context) == split
    )


def make_document(
    seed: int,
    *,
    kind: str = "place",
    n_facts: int = 8,
    n_fillers: int = 0,
    n_questions: int = 8,
    split: Split = "train",
) -> Document:
    """A context and up to `n_questions` different questions about it, easier ones (`Kind.drills`) among them.

    >>> print(make_document(0, n_facts=2, n_questions=1).text.rstrip())
    Max has ink in Cairo. Jack has hemp in Bath.
    Q: Where is the hemp?
    A: Bath
    """
    world = World.of(kind, n_facts, n_fillers)
    documents = (_document(world, rng, n_questions) for rng in _draws("document", seed, world, split))
    return next(document for document in documents if _split_of(document.context) == split)


def _item(world: World, rng: Random) -> Item:
    form, row = _choose(world, rng)
    return _asked(world, world.table(rng), form, row, rng)


def _twins(world: World, rng: Random) -> tuple[Item, Item]:
    form, row = _choose(world, rng)
    table, order = world.table(rng), rng.getrandbits(64)
    other = world.deal(table, form, rng)
    return _asked(world, table, form, row, Random(order)), _asked(world, other, form, row, Random(order))


def _document(world: World, rng: Random, n_questions: int) -> Document:
    table, forms = world.table(rng), world.kind.forms + world.kind.drills
    asked = [world.ask(table, form, row) for form in forms for row in range(world.n_rows)]
    questions, answers = zip(*rng.sample(asked, min(n_questions, len(asked))), strict=True)
    return Document(world.context(table, rng), questions, answers)


def _choose(world: World, rng: Random) -> tuple[Form, int]:
    return rng.choice(world.kind.forms), rng.randrange(world.n_rows)


def _asked(world: World, table: Table, form: Form, row: int, rng: Random) -> Item:
    question, answer = world.ask(table, form, row)
    choices = world.kind.columns[form.answer]
    return Item(world.context(table, rng), question, answer, choices, world.name, world.n_facts)


def _draws(use: str, seed: int, world: World, split: Split) -> Iterator[Random]:
    """Endless generators for one request, the same ones each time."""
    if split not in get_args(Split):
        raise UnknownName("split", split, get_args(Split))
    request = f"{use} {seed} {world.name} {world.n_rows} {world.n_fillers} {split}"
    return (Random(f"{request} {attempt}") for attempt in count())


def _split_of(context: str) -> Split:
    return _SPLIT_OF_CRC[zlib.crc32(context.encode()) % len(_SPLIT_OF_CRC)]
