"""kvferry: hand what one language model has read to another one, as a KV cache.

Importing it loads nothing heavy: each public name is fetched from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kvferry.errors import KvferryError

if TYPE_CHECKING:
    from kvferry.align.folder import load_aligner
    from kvferry.kv import KV, Geometry, Plan, Spans
    from kvferry.models.capture import Captured, capture, capture_rotated
    from kvferry.models.generate import Sampling, generate
    from kvferry.models.load import Model, load, wrap
    from kvferry.models.state import State, empty, generate_inputs, inject, read
    from kvferry.session.message import Message, text_message
    from kvferry.session.receiver import Receiver
    from kvferry.session.reply import Reply
    from kvferry.session.sender import Sender

__version__ = "0.1.0"

__all__ = [
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

_HOME = {
    "Captured": "kvferry.models.capture",
    "Geometry": "kvferry.kv",
    "KV": "kvferry.kv",
    "Message": "kvferry.session.message",
    "Model": "kvferry.models.load",
    "Plan": "kvferry.kv",
    "Receiver": "kvferry.session.receiver",
    "Reply": "kvferry.session.reply",
    "Sampling": "kvferry.models.generate",
    "Sender": "kvferry.session.sender",
    "Spans": "kvferry.kv",
    "State": "kvferry.models.state",
    "capture": "kvferry.models.capture",
    "capture_rotated": "kvferry.models.capture",
    "empty": "kvferry.models.state",
    "generate": "kvferry.models.generate",
    "generate_inputs": "kvferry.models.state",
    "inject": "kvferry.models.state",
    "load": "kvferry.models.load",
    "load_aligner": "kvferry.align.folder",
    "read": "kvferry.models.state",
    "text_message": "kvferry.session.message",
    "wrap": "kvferry.models.load",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvferry' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
