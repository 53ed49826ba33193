"""The kinds of world, as data: columns of words, the sentences that state a row, the questions about it."""

from dataclasses import dataclass

from kvferry.models.zoo.words import GOODS, NAMES, NUMBERS, THINGS, TOWNS


@dataclass(frozen=True)
class Form:
    """A way to ask: the `given` columns stand in the question, the `answer` column is asked for."""

    template: str
    given: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Kind:
    """Columns (name -> words), which of them never repeat a word, the sentences of one row, the questions.

    In a `disjoint` kind no word of one distinct column occurs in another.
    `drills` are questions that only training documents ask: the steps on the way to the real ones.
    """

    columns: dict[str, tuple[str, ...]]
    distinct: tuple[str, ...]
    sentences: tuple[str, ...]
    forms: tuple[Form, ...]
    drills: tuple[Form, ...] = ()
    disjoint: bool = False


PLACE = Kind(
    columns={"good": GOODS, "name": NAMES, "town": TOWNS},
    distinct=("good",),
    sentences=("{name} has {good} in {town}.",),
    forms=(Form("Where is the {good}?", ("good",), "town"), Form("Who has the {good}?", ("good",), "name")),
)
MET = Kind(
    columns={"one": NAMES, "two": NAMES},
    distinct=("one", "two"),
    sentences=("{one} met {two}.",),
    forms=(Form("Who was met by {one}?", ("one",), "two"), Form("Who met {two}?", ("two",), "one")),
)
COUNT = Kind(
    columns={"name": NAMES, "thing": THINGS, "number": NUMBERS},
    distinct=("name",),
    sentences=("{name} has {number} {thing}.",),
    forms=(Form("How many {thing} does {name} have?", ("name", "thing"), "number"),),
)
TWO_HOP = Kind(
    columns={"one": NAMES, "two": NAMES, "town": TOWNS},
    distinct=("one", "two"),
    sentences=("{one} is with {two}.", "{two} is in {town}."),
    forms=(Form("Where is {one}?", ("one",), "town"),),
    drills=(Form("Where is {two}?", ("two",), "town"), Form("With whom is {one}?", ("one",), "two")),
    disjoint=True,
)
PAIR = Kind(
    columns={"good": GOODS, "town": TOWNS},
    distinct=("good",),
    sentences=("{good} in {town}.",),
    forms=(Form("{good}?", ("good",), "town"),),
)
OWNER = Kind(
    columns={"good": GOODS, "name": NAMES},
    distinct=("good",),
    sentences=("{name} has {good}.",),
    forms=(Form("Who has the {good}?", ("good",), "name"),),
)
KINDS = {
    "pair": PAIR,
    "owner": OWNER,
    "place": PLACE,
    "met": MET,
    "count": COUNT,
    "two_hop": TWO_HOP,
    "needle": PLACE,
}
