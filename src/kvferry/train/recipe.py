"""Recipes: YAML files that say everything about a fit but the two models.

Read strictly: a key that is not known, one that stands twice, a value of another type or out of range is an error that
names the line. Nothing is converted, so `steps: "3000"` is refused. Numbers are those of YAML 1.2: `7e-4` is one.
"""

import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from kvferry.align.contract import Grid
from kvferry.align.folder import aligner_class
from kvferry.codec import CODECS, Codec
from kvferry.errors import BadSpec, UnknownName, UsageError
from kvferry.select.contract import Selector
from kvferry.spec import read_call
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.objective import loss_of
from kvferry.train.selection import selection_of
from kvferry.train.strict_yaml import read_strictly


def _codec(spec: str) -> str:
    CODECS.parse(spec)
    return spec


def _aligner(spec: str) -> str:
    aligner_call(spec)
    return spec


def _selection(spec: str) -> str:
    selection_of(spec)
    return spec


def _loss(spec: str) -> str:
    loss_of(spec)
    return spec


def _weight(value: float) -> float:
    if not 0 < value < math.inf:
        raise UsageError(
            f"{value} is no weight of a loss", cure="Give a positive number, or leave the loss out"
        )
    return value


@dataclass(frozen=True)
class DataRecipe:
    """What is read, by a name as `source_of` knows it, a path from the current folder; and how much at once."""

    source: str = "worlds"
    texts: int = 512
    """Contexts for closed forms."""
    batch_size: int = 16
    """Contexts in a training step, over all processes and pieces."""

    def __post_init__(self) -> None:
        for name, value in (("texts", self.texts), ("batch_size", self.batch_size)):
            if value < 1:
                raise UsageError(f"{name} is {value}, out of range", cure="Give at least 1")


@dataclass(frozen=True)
class FitRecipe:
    """A fit: the map, the codecs that it must bear, the data, the losses by weight, and the loop.

    `loop.steps` of 0 is the closed form alone.
    """

    aligner: Annotated[str, AfterValidator(_aligner)]
    codecs: tuple[Annotated[str, AfterValidator(_codec)], ...]
    data: DataRecipe = field(default_factory=DataRecipe)
    grid: Grid = "sender"
    """Whose tokens the slots are: the sender's, or the receiver's, to which the sender then pools."""
    losses: dict[Annotated[str, AfterValidator(_loss)], Annotated[float, AfterValidator(_weight)]] = field(
        default_factory=lambda: {"answer": 1.0}
    )
    """`answer`, `own_text`, and losses of caches by their specs, see `kvferry.train.objective`."""
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    selections: tuple[Annotated[str, AfterValidator(_selection)], ...] = ("all",)
    """Selectors that training takes turns in, after each round of the codecs; the closed form is of whole caches."""

    def __post_init__(self) -> None:
        """What stands in a file was looked at before, where its line is known; this is for all other makers."""
        lists = {"codecs": self.codecs, "selections": self.selections, "losses": self.losses}
        for name, value in lists.items():
            if not value:
                raise UsageError(f"{name} is empty, out of range", cure=f"Name at least one of {name}")
        aligner_call(self.aligner)
        self.parsed()
        self.selectors()
        if self.selections != ("all",) and not self.loop.steps:
            cure = "Give loop.steps, or leave selections out: a closed form is of whole caches"
            raise UsageError(f"selections {'; '.join(self.selections)} with 0 steps", cure=cure)
        for spec, weight in self.losses.items():
            _loss(spec)
            _weight(weight)

    def parsed(self) -> list[Codec]:
        """The codecs."""
        return [CODECS.parse(spec) for spec in self.codecs]

    def selectors(self) -> list[Selector]:
        """The selections."""
        return [selection_of(spec) for spec in self.selections]


def load_recipe(path: Path) -> FitRecipe:
    """Read a recipe.

    Raises `UnknownName` for a key, codec, aligner or option that does not exist, `BadSpec` for values of another type
    or text that is no YAML, `UsageError` for values out of range and files that cannot be read; all name file and line.
    """
    return read_strictly(path, FitRecipe)


def aligner_call(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of an aligner, as its constructor takes them behind the contract.

    Raises `UnknownName` for either, `BadSpec` for what is no spec and for values of another type.

    >>> aligner_call("linear(neighbours=4)")
    ('linear', {'neighbours': 4})
    """
    name, positional, options = read_call(spec)
    parameters = inspect.signature(aligner_class(name)).parameters
    known = list(parameters)[1:]
    if len(positional) > len(known) or set(known[: len(positional)]) & set(options):
        raise BadSpec(f"too many values for {name}", cure=f"Its options are: {', '.join(known) or 'none'}")
    for option in options:
        if option not in known:
            raise UnknownName(f"option of aligner {name}", option, known)
    options = {**dict(zip(known, positional, strict=False)), **options}
    for option, value in options.items():
        _require_type(name, option, value, parameters[option].annotation)
    return name, options


def _require_type(name: str, option: str, value: object, annotation: Any) -> None:
    """As the constructor has it; `sources` may be a rule of `LAYER_MAPS` too."""
    wanted = str | annotation if option == "sources" else annotation
    try:
        TypeAdapter(wanted).validate_python(value, strict=True)
    except ValidationError as error:
        cure = error.errors()[0]["msg"]
        raise BadSpec(f"aligner {name}: {option}={value!r} is not valid", cure=cure) from None
