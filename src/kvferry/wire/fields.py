"""What a header says: kinds, the `Header` itself, and the `Agreement` that shortens it. header.py makes it bytes."""

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from kvferry.errors import UsageError

MAJOR, MINOR = 1, 0
STEPS_PER_OCTAVE = 64
"""The step of a header is i of 2**(i / 64)."""
_CONTRACT = struct.Struct("<BBQQQQ")


class MessageKind(IntEnum):
    """What a frame is there for."""

    KV = 1
    TEXT = 2
    HELLO = 3
    REQUEST = 4
    REPORT = 5
    RESET = 6
    ERROR = 7


class FrameType(IntEnum):
    """I stands alone; P needs the state that the frame `reference_id` left."""

    I = 0  # noqa: E741 (the letter of video coding)
    P = 1


class TokenGrid(IntEnum):
    """Whose tokens the slots stand for."""

    SENDER = 0
    RECEIVER = 1


@dataclass(frozen=True)
class Agreement:
    """What a hello settles and a short header need not repeat: the four hashes, and the minor version of the writer.

    >>> Agreement(model_hash=1).contract_id == Agreement(model_hash=1).contract_id != Agreement().contract_id
    True
    """

    model_hash: int = 0
    geometry_hash: int = 0
    tokenizer_hash: int = 0
    profile_hash: int = 0
    minor: int = MINOR

    @property
    def contract_id(self) -> int:
        """The low 32 bits of XXH3-64 over major u8, minor u8 and the hashes u64 in the order of the fields.

        Both sides compute it, so nobody hands out ids. `UsageError` for a hash beyond 64 bits.
        """
        hashes = (self.model_hash, self.geometry_hash, self.tokenizer_hash, self.profile_hash)
        return checksum(packed(_CONTRACT, MAJOR, self.minor, *hashes))


@dataclass(frozen=True)
class Header:
    """The fields of the header. Hashes are the first 64 bits of the fingerprints; 0 means none.

    A P frame refers to one of the 65,535 frames before it.
    """

    kind: MessageKind
    frame_type: FrameType = FrameType.I
    frame_id: int = 0
    reference_id: int = 0
    reference_hash: int = 0
    """64 bits over the state that the frame `reference_id` left at the receiver; 0 in an I frame."""
    step: int = 0
    """Quantiser step of the frame, in `STEPS_PER_OCTAVE`; 0 where the codec has none."""
    n_tokens: int = 0
    model_hash: int = 0
    geometry_hash: int = 0
    tokenizer_hash: int = 0
    profile_hash: int = 0
    grid: TokenGrid = TokenGrid.SENDER
    minor: int = MINOR
    """The minor version of the format that the frame was written in."""
    short: bool = False
    """Written in the short form, for readers that know `agreement` since hello."""

    @property
    def agreement(self) -> Agreement:
        """What a reader must know for the short form of this header."""
        return Agreement(
            self.model_hash, self.geometry_hash, self.tokenizer_hash, self.profile_hash, self.minor
        )


def checksum(*parts: bytes | memoryview) -> int:
    """The low 32 bits of XXH3-64 over the parts joined.

    >>> checksum(b"ab", b"c") == checksum(b"abc")
    True
    """
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest() & 0xFFFFFFFF


def packed(layout: struct.Struct, *values: bytes | int) -> bytes:
    """The values in this layout; `UsageError` for one that does not fit."""
    try:
        return layout.pack(*values)
    except struct.error as error:
        cure = "Ids and n_tokens take 32 bits, hashes 64, step 16 signed, minor 8"
        raise UsageError(f"a header field is out of range in {values}: {error}", cure=cure) from None
