"""KVWire: `pack(Frame) -> bytes` and `unpack(bytes, limits) -> Frame`. It knows segments, never tensors.

The format is normative in docs/format.md.
"""

from kvferry.wire.fields import MAJOR, MINOR, Agreement, FrameType, MessageKind, TokenGrid
from kvferry.wire.frame import Frame, Prefix, pack, packed_bytes, unpack, unpack_prefix
from kvferry.wire.header import HEADER_BYTES, SHORT_HEADER_BYTES
from kvferry.wire.limits import DEFAULT_LIMITS, Limits
from kvferry.wire.packets import MIN_DATAGRAM_BYTES, Datagram, cut, read_datagram
from kvferry.wire.reassembly import Reassembly
from kvferry.wire.seal import MAC_BYTES
from kvferry.wire.segments import Segment, SegmentType
from kvferry.wire.text import json_frame, read_json, read_text, text_frame

__all__ = [
    "DEFAULT_LIMITS",
    "HEADER_BYTES",
    "MAC_BYTES",
    "MAJOR",
    "MINOR",
    "MIN_DATAGRAM_BYTES",
    "SHORT_HEADER_BYTES",
    "Agreement",
    "Datagram",
    "Frame",
    "FrameType",
    "Limits",
    "MessageKind",
    "Prefix",
    "Reassembly",
    "Segment",
    "SegmentType",
    "TokenGrid",
    "cut",
    "json_frame",
    "pack",
    "packed_bytes",
    "read_datagram",
    "read_json",
    "read_text",
    "text_frame",
    "unpack",
    "unpack_prefix",
]
