"""The public names are this list; nothing becomes public by accident."""

import ast

import pytest

import kvferry
from source import PACKAGE

PUBLIC = [
    "Captured",
    "Geometry",
    "KV",
    "KvferryError",
    "Message",
    "Model",
    "Plan",
    "Receiver",
    "Reply",
    "Sampling",
    "Sender",
    "Spans",
    "State",
    "capture",
    "capture_rotated",
    "empty",
    "generate",
    "generate_inputs",
    "inject",
    "load",
    "load_aligner",
    "read",
    "text_message",
    "wrap",
]


def test_the_list_is_the_promise() -> None:
    assert sorted(PUBLIC) == kvferry.__all__


def test_every_public_name_is_there_and_comes_from_its_home() -> None:
    assert all(getattr(kvferry, name).__name__ == name for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(kvferry))


def test_type_checkers_see_what_is_fetched_lazily() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == kvferry._HOME


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Kv'"):
        kvferry.Kv  # noqa: B018
