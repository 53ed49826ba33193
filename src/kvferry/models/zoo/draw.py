"""A world of given size: draws the words of its facts, writes them down, asks about them."""

from dataclasses import dataclass
from random import Random

from kvferry.errors import UnknownName, UsageError
from kvferry.models.zoo.kinds import KINDS, Form, Kind
from kvferry.models.zoo.words import FILLERS, GOODS, NAMES, TOWNS

Table = dict[str, list[str]]  # column -> its words, one per row

MAX_FACTS = 32


@dataclass(frozen=True)
class World:
    """The shape of a world: everything but the draw."""

    name: str
    kind: Kind
    n_rows: int
    n_fillers: int

    @property
    def n_facts(self) -> int:
        return self.n_rows * len(self.kind.sentences)

    @classmethod
    def of(cls, name: str, n_facts: int, n_fillers: int) -> "World":
        if name not in KINDS:
            raise UnknownName("kind of world", name, KINDS)
        kind = KINDS[name]
        n_facts = len(kind.sentences) if name == "needle" else n_facts
        n_rows, rest = divmod(n_facts, len(kind.sentences))
        if rest or not 1 <= n_facts <= MAX_FACTS:
            cure = f"Choose 1 to {MAX_FACTS}, a multiple of {len(kind.sentences)}"
            raise UsageError(f"a {name!r} world cannot hold {n_facts} facts", cure=cure)
        if n_fillers < 0:
            raise UsageError(f"n_fillers is {n_fillers}", cure="Choose 0 or more")
        return cls(name, kind, n_rows, n_fillers)

    def table(self, rng: Random) -> Table:
        """The words of each column, drawn until no row repeats a word."""
        while True:
            table = {name: self._column(name, rng) for name in self.kind.columns}
            if self.kind.disjoint:
                table |= self._disjoint_columns(rng)
            if _rows_differ(table):
                return table

    def _column(self, name: str, rng: Random) -> list[str]:
        words = self.kind.columns[name]
        return (
            rng.sample(words, self.n_rows)
            if name in self.kind.distinct
            else rng.choices(words, k=self.n_rows)
        )

    def _disjoint_columns(self, rng: Random) -> Table:
        names = self.kind.distinct
        words = rng.sample(self.kind.columns[names[0]], self.n_rows * len(names))
        return {name: words[i :: len(names)] for i, name in enumerate(names)}

    def deal(self, table: Table, form: Form, rng: Random) -> Table:
        """Another table in which the columns that the form names are the same."""
        kept = {name: table[name] for name in form.given}
        while True:
            other = (
                self.table(rng) if self.n_rows == 1 else {k: rng.sample(v, len(v)) for k, v in table.items()}
            )
            if _rows_differ(other := other | kept):
                return other

    def ask(self, table: Table, form: Form, row: int) -> tuple[str, str]:
        """A question and its answer."""
        words = _row(table, row)
        return form.template.format(**words), words[form.answer]

    def context(self, table: Table, rng: Random) -> str:
        """All facts and fillers, in any order."""
        facts = [s.format(**_row(table, i)) for i in range(self.n_rows) for s in self.kind.sentences]
        sentences = facts + [_filler(rng) for _ in range(self.n_fillers)]
        rng.shuffle(sentences)
        return " ".join(sentences)


def _row(table: Table, i: int) -> dict[str, str]:
    return {name: words[i] for name, words in table.items()}


def _rows_differ(table: Table) -> bool:
    return all(len(set(row)) == len(row) for row in zip(*table.values(), strict=True))


def _filler(rng: Random) -> str:
    words = {"name": rng.choice(NAMES), "good": rng.choice(GOODS), "town": rng.choice(TOWNS)}
    return rng.choice(FILLERS).format(**words)
