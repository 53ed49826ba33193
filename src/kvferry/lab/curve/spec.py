"""A way of sending a cache, in one line: `SELECTOR | CODEC`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec import CODECS, Codec
from kvferry.errors import BadSpec, UsageError
from kvferry.select import SELECTORS
from kvferry.select.all import All
from kvferry.select.contract import Selector, TokenSelector

QUESTION = "question"
DEFAULT_SPECS = (
    "all | ecsq",
    "knorm | int(bits=4)",
    "snapkv | int(bits=4)",
    "knorm | ecsq",
    "snapkv | ecsq",
    "lagrangian | ecsq",
)


@dataclass(frozen=True)
class Spec:
    """What is kept of a cache, and how that is coded.

    >>> spec = Spec.parse("back(sinks=2) | int(bits=4)")
    >>> spec.name, spec.family
    ('back(sinks=2) | int(bits=4)', 'tokens | int')
    """

    selector: Selector
    codec: Codec

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """`BadSpec` without a bar, `UnknownName` and `BadSpec` as the tables raise them."""
        selector, bar, codec = text.partition("|")
        if not bar:
            raise BadSpec(f"{text!r} is no way of sending", cure="Write SELECTOR | CODEC, say 'all | ecsq'")
        return cls(SELECTORS.parse(selector), CODECS.parse(codec))

    @property
    def name(self) -> str:
        """The shortest text that means the same."""
        return f"{self.selector.brief()} | {self.codec.agreed().brief()}"

    @property
    def identity(self) -> str:
        """Every option, defaults too, and what lies in folders: whatever changes makes another way of sending."""
        said = f"{self.selector!r} | {self.codec.agreed()!r}"
        return " ".join([said, *self.selector.fitted()])

    @property
    def family(self) -> str:
        """Who competes for being the best of a kind: token selectors by codec, those that are asked, others alone."""
        if self.selector.reads_question:
            return QUESTION
        keeps_tokens = isinstance(self.selector, TokenSelector | All)
        return f"{'tokens' if keeps_tokens else self.selector.name} | {self.codec.name}"


def specs_of(texts: Iterable[str], file: Path | None = None) -> tuple[Spec, ...]:
    """Of texts, several in one where `;` parts them, and of the lines of a file; each spec once, in order.

    >>> [spec.name for spec in specs_of(["all | raw; back | raw", "all|raw"])]
    ['all | raw', 'back | raw']
    """
    parts = [part for text in texts for part in text.split(";")] + _lines(file)
    found = [Spec.parse(part) for part in parts if part.strip()]
    if not found:
        raise UsageError("no way of sending is named", cure="Write SELECTOR | CODEC, say 'all | ecsq'")
    return tuple(dict.fromkeys(found))


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cure = "Give a text file with one SELECTOR | CODEC to a line"
        raise UsageError(f"cannot read {file}: {_reason(error)}", cure=cure) from None
    return [text for line in lines if (text := line.partition("#")[0])]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or "" if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"


def needs_of(specs: Sequence[Spec]) -> tuple[str, ...]:
    """What capture must record for all of them."""
    return tuple(sorted({need for spec in specs for need in spec.selector.needs}))
