"""The package's own source, parsed once, for the tests that keep the house in order."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "kvferry"


@dataclass(frozen=True)
class Module:
    """One file: its path from the package's folder, its room, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder, or the file, right under the package; empty for the package itself."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "" if first == "__init__" else first

    def imports(self) -> Iterator[str]:
        """Dotted names of everything imported at any depth, and of what a table of methods names as a string."""
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    yield from (name.name for name in names)
                case ast.ImportFrom(module=str(module), names=names):
                    yield from (f"{module}.{name.name}" for name in names)
                case ast.Constant(value=str(text)) if text.startswith("kvferry.") and ":" in text:
                    yield text.split(":")[0]
                case _:
                    pass

    def own_rooms(self) -> set[str]:
        """The other rooms of the package that this file imports; "" for the package itself."""
        own = [name.split(".") for name in self.imports() if name.split(".")[0] == "kvferry"]
        allowed_from_top = (["kvferry", "__version__"],)
        return {parts[1] if len(parts) > 1 else "" for parts in own if parts not in allowed_from_top} - {
            self.room
        }

    def foreign(self) -> set[str]:
        """Top-level names of the third-party packages that this file imports."""
        return {name.split(".")[0] for name in self.imports()} - {"kvferry"} - sys.stdlib_module_names


@cache
def modules() -> tuple[Module, ...]:
    paths = sorted(PACKAGE.rglob("*.py"))
    texts = [(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    return tuple(Module(path, text, ast.parse(text, path)) for path, text in texts)
