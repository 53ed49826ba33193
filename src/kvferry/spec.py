"""A method is its configuration: `int(bits=4, group=32, axis=token)` <-> object <-> JSON.

Rule 1: a method is a frozen dataclass that derives from `Method`; its fields are its whole identity.
Rule 2: `repr(method)` is valid input of `Table.parse`, and parsing it gives an equal object.
Rule 3: a `Table` names its members as "module:Class" and imports one only when it is asked for.
"""

import ast
import dataclasses
import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoints, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvferry.errors import BadSpec, KvferryError, UnknownName


@dataclasses.dataclass(frozen=True, repr=False)
class Method:
    """Base of everything that a table lists: codecs, selectors, aligners, fusers."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        values = [f"{key}={_write(value)}" for key, value in self.config().items()]
        return f"{self.name}({', '.join(values)})" if values else self.name

    def brief(self) -> str:
        """The shortest spec: options at their defaults are left out."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = [f"{key}={_write(value)}" for key, value in self.config().items() if value != defaults[key]]
        return f"{self.name}({', '.join(values)})" if values else self.name

    def config(self) -> dict[str, Any]:
        """The fields as plain values, in order."""
        return {name: getattr(self, name) for name in _options(type(self))}

    def to_json(self) -> dict[str, Any]:
        """`{"name": ..., field: value ...}`, ready for `json.dumps`."""
        return {"name": self.name, **self.config()}


M = TypeVar("M", bound=Method)


def _options(cls: type[Method]) -> list[str]:
    """The fields in order; those that a base class adds by name alone (`kw_only`) come last."""
    return [field.name for field in sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only))]


class Table(Generic[M]):
    """The members of one family, by name, imported on demand.

    Outsiders join through an entry point of the group `kvferry.<kind>`.
    """

    def __init__(self, kind: str, members: Mapping[str, str]) -> None:
        self.kind = kind
        self._members = dict(members)

    def names(self) -> list[str]:
        return sorted({*self._members, *(point.name for point in self._plugins())})

    def get(self, name: str) -> type[M]:
        """The class behind a name; `UnknownName` with the nearest one otherwise."""
        if name in self._members:
            module, _, attribute = self._members[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in self._plugins():
            if point.name == name:
                return point.load()
        raise UnknownName(self.kind, name, self.names())

    def parse(self, text: str) -> M:
        """`"int(bits=4)"` to the method; defaults fill what is not said."""
        name, positional, named = read_call(text)
        return self._build(name, _place(self.get(name), name, positional, named))

    def from_json(self, data: Mapping[str, Any]) -> M:
        """The inverse of `Method.to_json`."""
        config = dict(data)
        return self._build(str(config.pop("name", "")), config)

    def _build(self, name: str, config: dict[str, Any]) -> M:
        cls = self.get(name)
        for key in config:
            if key not in _options(cls):
                raise UnknownName(f"option of {self.kind} {name}", key, _options(cls))
        try:
            return TypeAdapter(cls).validate_python(config)
        except ValidationError as error:
            raise _bad_value(self.kind, name, error) from None

    def _plugins(self) -> EntryPoints:
        return entry_points(group=f"kvferry.{self.kind}")


def read_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Split `name(1, key=value)` into its parts, without evaluating anything.

    >>> read_call("int(8, axis=token)")
    ('int', [8], {'axis': 'token'})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise SyntaxError
        named = {str(word.arg): _read(word.value) for word in node.keywords}
        positional = [_read(value) for value in node.args]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadSpec(
            f"cannot read the spec {text[:80]!r}", cure="Write it as name(option=value, ...)"
        ) from None
    if len(named) < len(node.keywords):
        raise BadSpec(f"an option stands twice in the spec {text[:80]!r}", cure="Leave one of them out")
    return node.func.id, positional, named


def _read(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _write(value: object) -> str:
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def _place(cls: type[Method], name: str, positional: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    fields = _options(cls)
    if len(positional) > len(fields) or set(fields[: len(positional)]) & set(named):
        raise BadSpec(f"too many values for {name}", cure=f"Its options are: {', '.join(fields) or 'none'}")
    return {**dict(zip(fields, positional, strict=False)), **named}


def _bad_value(kind: str, name: str, error: ValidationError) -> BadSpec:
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, KvferryError):  # the method's own check, of values that had the right types
        return BadSpec(f"{kind} {name}: {own.what}", cure=own.cure)
    where = ".".join(str(part) for part in first["loc"])
    return BadSpec(f"{kind} {name}: {where}={first['input']!r} is not valid", cure=first["msg"])
