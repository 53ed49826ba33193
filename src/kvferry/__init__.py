"""kvferry: hand what one language model has read to another one, as a KV cache.

Importing it loads nothing heavy: each public name is fetched from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kvferry.errors import KvferryError

if TYPE_CHECKING:
    from kvferry.kv import KV, Geometry, Plan, Spans

__version__ = "0.1.0"

__all__ = ["Geometry", "KV", "KvferryError", "Plan", "Spans"]

_HOME = {
    "Geometry": "kvferry.kv",
    "KV": "kvferry.kv",
    "Plan": "kvferry.kv",
    "Spans": "kvferry.kv",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvferry' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
