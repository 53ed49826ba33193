"""Moves opaque bytes from one side to the other and counts them; knows nothing of what they mean.

A `Channel` carries whole messages, in order, both ways. `memory_pair` joins two ends in one process, `connect` and
`listen` two processes by TCP, `write_message` and `read_message` two moments by a file. All count through a `Meter`.
"""

from kvferry.link.channel import Channel, Meter
from kvferry.link.file import read_message, write_message
from kvferry.link.listener import Listener, listen
from kvferry.link.memory import memory_pair
from kvferry.link.tcp import connect

__all__ = [
    "Channel",
    "Listener",
    "Meter",
    "connect",
    "listen",
    "memory_pair",
    "read_message",
    "write_message",
]
