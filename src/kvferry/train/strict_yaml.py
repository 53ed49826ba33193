"""YAML into a dataclass and the dataclasses of its sections; every error names the file and the line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kvferry.errors import BadSpec, KvferryError, UnknownName
from kvferry.train.sources.files import read_text

T = TypeVar("T")
_SCALARS = (
    ("bool", r"true|false"),
    ("null", r"~|null|"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
)


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2. Those of 1.1, PyYAML's own, make `7e-4` a text, `on` a truth and 010 an eight."""

    yaml_implicit_resolvers: ClassVar = {
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{form})$")) for kind, form in _SCALARS]
    }


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    root: yaml.Node

    def at(self, node: yaml.Node) -> str:
        return f"line {node.start_mark.line + 1} of {self.path}"

    def find(self, keys: tuple[str | int, ...]) -> yaml.Node:
        """The node behind keys and indices, or the deepest one on the way to it."""
        node = self.root
        for key in keys:
            below = _children(node).get(str(key))
            if below is None:
                break
            node = below
        return node


def read_strictly(path: Path, cls: type[T]) -> T:
    """Read a file as `cls`, a dataclass whose sections are dataclasses; see `kvferry.train.recipe.load_recipe`."""
    file, data = _parse(path)
    _check_keys(file, file.root, cls)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(data, default=repr), strict=True)
    except ValidationError as error:
        raise _located(file, error) from None


def _parse(path: Path) -> tuple[_File, Any]:
    loader = _Loader(read_text(path))
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of {path}" if mark else str(path)
        what = getattr(error, "problem", None) or type(error).__name__
        raise BadSpec(f"{where} is no YAML: {what}", cure="Mind indents and quotes") from None
    if node is None or not isinstance(data, dict):
        raise BadSpec(f"{path} holds no keys but {type(data).__name__}", cure="Write `key: value` lines")
    return _File(path, node), data


def _check_keys(file: _File, node: yaml.Node, cls: type | None) -> None:
    """Every key once, and those of a dataclass among its fields. Sections that are no dataclass have free keys."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)} if cls else {}
    seen: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if cls and key.value not in fields:
            raise UnknownName(f"key in {file.at(key)}", str(key.value), fields)
        if key.value in seen:
            raise BadSpec(
                f"{key.value!r} stands a second time in {file.at(key)}", cure="Leave one of them out"
            )
        seen.add(key.value)
        section = fields.get(key.value)
        below = section if isinstance(section, type) and dataclasses.is_dataclass(section) else None
        _check_keys(file, value, below)


def _children(node: yaml.Node) -> dict[str, yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): value for key, value in node.value}
    return (
        {str(i): value for i, value in enumerate(node.value)} if isinstance(node, yaml.SequenceNode) else {}
    )


def _located(file: _File, error: ValidationError) -> KvferryError:
    """The first thing that is wrong: an error of our own with its line in front, or pydantic's as a `BadSpec`."""
    first = error.errors()[0]
    keys, own = first["loc"], first.get("ctx", {}).get("error")
    named = (
        own.what.split()[0] if isinstance(own, KvferryError) else ""
    )  # "steps is -1": the name comes first
    where = f"{'.'.join(str(key) for key in keys) or 'recipe'} in {file.at(file.find((*keys, named)))}"
    if first["type"] == "missing":
        return BadSpec(f"{where} is missing", cure="Add it")
    if not isinstance(own, KvferryError):
        return BadSpec(f"{where}: {first['input']!r} is not valid", cure=first["msg"])
    own.what, own.args = f"{where}: {own.what}", (f"{where}: {own}",)
    return own
