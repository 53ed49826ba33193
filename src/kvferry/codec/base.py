"""What every codec does: `encode(kv, plan, max_bytes) -> Frame`, `decode(frame, geometry) -> KV`, `roundtrip(kv)`.

A codec is its configuration, and the configuration travels in the segment SPEC, as text. A message chooses among the
codecs of the built-in table and can cause no other import.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from kvferry.codec.manifest import wire_hash
from kvferry.codec.table import CODECS, ON_THE_WIRE
from kvferry.errors import BadSpec, CodecNotCovered, Malformed, ShapeMismatch, UsageError
from kvferry.kv import KV, Geometry, KeySpace, Plan
from kvferry.spec import Method
from kvferry.wire import DEFAULT_LIMITS, Frame, Limits, Segment, SegmentType
from kvferry.wire.header import Header

__all__ = ["Codec", "codec_of", "decode", "kept", "roundtrip", "spec_segment", "wire_hash"]

_MAX_SPEC_BYTES = 256
_SPEC = re.compile(r"([a-z][a-z0-9_]*)(\([\w=, .+-]*\))?", re.ASCII)


@dataclass(frozen=True, repr=False)
class Codec(Method, ABC):
    """Turns the cache of one sequence into a frame and back."""

    spaces: ClassVar[tuple[KeySpace, ...]] = ("content", "rotated")
    """Key spaces it takes; `WrongKeySpace` for another."""

    @abstractmethod
    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        """The frame of one sequence, `len(pack(frame)) <= max_bytes`.

        Absent slots and tokens of class 0 are not sent. Keys are taken as they are; their space is recorded.
        Raises `NotFinite`, `BudgetTooSmall` with the smallest cap that would do, `ShapeMismatch` for a batch.
        """

    @abstractmethod
    def smallest(self, kv: KV, plan: Plan | None = None) -> int:
        """The fewest bytes that `encode` can make of a plan: what `BudgetTooSmall` would name."""

    @abstractmethod
    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        """The cache of a frame, float32, zero in absent slots. Call the function `decode`, which finds the codec."""

    @abstractmethod
    def roundtrip(self, kv: KV) -> KV:
        """What `decode(encode(...))` does to every sequence of a batch, as tensor operations, without gradient.

        Slots stay where they are; absent ones become zero. Values are not checked for NaN: no device is waited for.
        """

    def said_by(self, header: Header) -> "Codec":
        """This codec with the options that a header says, which are left out of SPEC."""
        return self

    def unsaid(self) -> "Codec":
        """This codec with those options at their defaults."""
        return self

    def agreed(self) -> "Codec":
        """This codec as the other side knows it: what lies in files is named by hash."""
        return self

    @property
    def profile_hash(self) -> int:
        """The profile that its messages name; 0 for none."""
        return 0


def codec_of(frame: Frame) -> Codec:
    """The codec that a frame names; `CodecNotCovered` if it is not built in, `Malformed` if unreadable.

    >>> from kvferry.wire import MessageKind
    >>> frame = Frame(MessageKind.KV, segments=(spec_segment(CODECS.parse("raw")),))
    >>> codec_of(frame)
    raw(dtype=float32, zstd=0)
    """
    body = frame.body(SegmentType.SPEC) or b""
    text = body[:_MAX_SPEC_BYTES].decode("ascii", "replace")
    match = _SPEC.fullmatch(text)
    if match is None or len(body) > _MAX_SPEC_BYTES:
        raise Malformed(
            f"SPEC {text!r} is no codec", cure=f"Write name(option=value, ...) in {_MAX_SPEC_BYTES} bytes"
        )
    if match[1] not in ON_THE_WIRE:
        raise CodecNotCovered(
            f"codec {match[1]!r} is not built in", cure=f"Use one of {', '.join(ON_THE_WIRE)}"
        )
    try:
        return _parsed(text).said_by(frame)
    except BadSpec as error:
        raise Malformed(f"SPEC {text!r} and step {frame.step}: {error.what}", cure=error.cure) from None


@lru_cache(maxsize=64)
def _parsed(text: str) -> Codec:
    try:
        codec = CODECS.parse(text)
    except UsageError as error:
        raise Malformed(f"SPEC {text!r}: {error.what}", cure=error.cure) from None
    if codec.unsaid().brief() != text:
        cure = f"Write {codec.unsaid().brief()}"
        raise Malformed(f"SPEC {text!r} is not canonical", cure=cure)
    return codec


def decode(
    frame: Frame,
    geometry: Geometry,
    limits: Limits = DEFAULT_LIMITS,
    device: torch.device | str = "cpu",
) -> KV:
    """The cache that a frame carries, in float32 on `device`. `geometry` is the sender's, as the receiver knows it.

    Raises `ForeignModel` for another sender, `CodecNotCovered`, `LimitExceeded`, or `Malformed`. Spans are empty
    (`start == end`) unless the frame has a segment SPANS; roles are those of the sender.
    """
    return codec_of(frame).decode(frame, geometry, limits, torch.device(device))


def roundtrip(codec: Codec, kv: KV) -> KV:
    """What the wire does to a batch: equal, to the bit, to decoding each encoded sequence. Float32, no gradient."""
    return codec.roundtrip(kv)


def spec_segment(codec: Codec) -> Segment:
    """The codec itself, as the shortest text: its defaults are part of the format."""
    return Segment(SegmentType.SPEC, codec.unsaid().brief().encode("ascii"))


def kept(kv: KV, plan: Plan | None) -> Bool[Tensor, "layers tokens"]:
    """The slots of a single sequence to send; `UsageError` where a plan keeps a token's key or value alone."""
    if kv.n_batch != 1:
        raise ShapeMismatch(
            f"a batch of {kv.n_batch}, a message holds 1", cure="Encode each of kv.sequences()"
        )
    present = kv.present[:, 0]
    if plan is None:
        return present
    wanted = (present.shape[0], 2, present.shape[1])
    if tuple(plan.classes.shape) != wanted:
        raise ShapeMismatch(f"a plan of {tuple(plan.classes.shape)}", cure=f"This cache needs {wanted}")
    keys, values = (plan.classes.to(present.device) > 0).unbind(1)
    alone = (keys != values) & present
    if bool(alone.any()):
        layer, token = (int(i) for i in alone.nonzero()[0])
        cure = "Keep both or neither: this codec sends keys and values of the same tokens"
        raise UsageError(
            f"layer {layer}, token {token}: the plan keeps only the key or only the value", cure=cure
        )
    return keys & present
