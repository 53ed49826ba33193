"""Imports point down only, and every file stays small enough to be read in one sitting."""

import ast
import subprocess
import sys

import pytest

from source import Module, modules

GROUND = {"errors", "files", "spec"}
NOUNS = {*GROUND, "kv", "rope"}
MATHS = {*NOUNS, "metrics"}
BELOW_MODELS = {*MATHS, "wire", "codec", "select", "align", "fuse"}
BELOW_VERBS = {*BELOW_MODELS, "models", "link"}
BELOW_LAB = {*BELOW_VERBS, "session", "train"}
BELOW_SHELL = {*BELOW_LAB, "lab"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "spec": {"errors"},
    "files": {"errors"},
    "weights": {"errors", "files"},
    "rope": GROUND,
    "kv": {*GROUND, "rope"},
    "wire": {"errors"},
    "metrics": NOUNS,
    "codec": {*MATHS, "wire"},
    "select": {*MATHS, "weights"},
    "align": {*MATHS, "weights"},
    "fuse": {*MATHS, "weights"},
    "models": BELOW_MODELS,
    "link": {"errors", "files"},
    "session": BELOW_VERBS,
    "train": BELOW_VERBS,
    "lab": BELOW_LAB,
    "cli": BELOW_SHELL,
    "server": BELOW_SHELL,
    "__main__": {"cli"},
}
"""Room -> the rooms below it that it may use. Siblings do not know each other."""

SOCKET_MODULES = {"socket", "socketserver", "ssl", "selectors"}
SOCKET_CALLS = {
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "open_connection",
    "open_unix_connection",
    "start_server",
    "start_unix_server",
}
PICKLERS = {"pickle", "marshal", "shelve", "dill", "joblib"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50


def names_used(module: Module) -> set[str]:
    """Attributes, and names brought in by `from ... import`."""
    attributes = {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    return attributes | {name.split(".")[-1] for name in module.imports()}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first to the last, docstring excluded."""
    docstring = ast.get_docstring(function, clean=False)
    hidden = docstring.count("\n") + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - hidden


def functions(module: Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node for node in ast.walk(module.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


@pytest.mark.parametrize(
    ("line", "rooms"),
    [
        ("import kvferry.session.sender", {"session"}),
        ("import kvferry", {""}),
        ("from kvferry import kv", {"kv"}),
        ("from kvferry import __version__", set()),
        ("from kvferry.models.load import load", {"models"}),
        ("def f():\n    from kvferry.lab import run", {"lab"}),
        ("TABLE = {'ridge': 'kvferry.align.ridge:Ridge'}", {"align"}),
        ("from kvferry.link.channel import Meter", set()),
        ("import torch, asyncio", set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(line: str, rooms: set[str]) -> None:
    assert Module("link/tcp.py", line, ast.parse(line)).own_rooms() == rooms


def test_every_room_has_its_place() -> None:
    assert {module.room for module in modules()} - {""} <= set(MAY_IMPORT)


def test_the_table_has_no_way_up_and_no_circle() -> None:
    order = list(MAY_IMPORT)
    assert all(order.index(used) < order.index(room) for room, below in MAY_IMPORT.items() for used in below)


def test_imports_point_down() -> None:
    wrong = [
        f"{module.path} imports {room or 'the package itself'}"
        for module in modules()
        if module.room
        for room in sorted(module.own_rooms() - MAY_IMPORT[module.room])
    ]
    assert wrong == []


def test_transformers_stays_in_models() -> None:
    assert [m.path for m in modules() if "transformers" in m.foreign() and m.room != "models"] == []


def test_sockets_stay_in_link_and_server() -> None:
    inland = [module for module in modules() if module.room not in {"link", "server"}]
    assert [m.path for m in inland if {name.split(".")[0] for name in m.imports()} & SOCKET_MODULES] == []
    assert [m.path for m in inland if names_used(m) & SOCKET_CALLS] == []


def test_wire_needs_little() -> None:
    assert {name for m in modules() if m.room == "wire" for name in m.foreign()} <= {"numpy", "xxhash"}


def test_nothing_is_unpickled() -> None:
    """Except by one peer of the bench, which reads back what it has just pickled itself."""
    ours = [module for module in modules() if module.path != "lab/wire/peers/pickled.py"]
    assert [m.path for m in ours if {name.split(".")[0] for name in m.imports()} & PICKLERS] == []
    assert [m.path for m in ours if "torch.load(" in m.text] == []


def test_annotations_are_real() -> None:
    """Postponed ones would hide shapes from the checker."""
    assert [m.path for m in modules() if "__future__.annotations" in set(m.imports())] == []


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [m.path for m in modules() if set(m.path.removesuffix(".py").split("/")) & drawers] == []


def test_files_are_short() -> None:
    sizes = {module.path: module.text.count("\n") for module in modules()}
    assert {path: n_lines for path, n_lines in sizes.items() if n_lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    sizes = {f"{m.path}:{f.lineno} {f.name}": body_lines(f) for m in modules() for f in functions(m)}
    assert {where: n_lines for where, n_lines in sizes.items() if n_lines > MAX_FUNCTION_LINES} == {}


HEAVY = {"torch", "transformers", "numpy", "pydantic", "jaxtyping", "safetensors", "scipy", "matplotlib"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    report = "\nimport sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import kvferry") & HEAVY == set()


def test_the_link_loads_nothing_heavy() -> None:
    assert loaded_after("import kvferry.link") & HEAVY == set()


ASK_FOR_HELP = """
import sys
from kvferry.cli import main
sys.argv = ["kvferry", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


def test_help_needs_no_model_library() -> None:
    assert loaded_after(ASK_FOR_HELP) & {"torch", "transformers", "scipy", "matplotlib"} == set()
