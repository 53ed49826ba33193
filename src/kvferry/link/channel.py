"""What every way of moving bytes has in common: the `Channel`, its `Meter` and its default limits."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvferry.errors import LimitExceeded

TIMEOUT_S = 30.0
"""The longest silence: how long one side waits without a single byte moving."""

MAX_MESSAGE_BYTES = 1 << 30
"""1 GiB: some 8,000 tokens of an 8-billion-parameter model at 16 bits, above what one message should ever be."""


@dataclass
class Meter:
    """Every byte that passed one end of a channel, by kind.

    The kind is the caller's word for what it sends or expects ("message", "hello", ...); what the transport itself
    adds is "framing". Unfinished messages count as far as they went.

    >>> meter = Meter()
    >>> meter.sent.update(framing=4, message=100)
    >>> meter.total_bytes
    104
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    @property
    def total_bytes(self) -> int:
        """Both directions, all kinds."""
        return self.sent.total() + self.received.total()


@runtime_checkable
class Channel(Protocol):
    """Whole messages, in order, both ways. One task may send while another receives, but no two do the same."""

    meter: Meter

    async def send(self, data: bytes, kind: str = "message") -> None:
        """Hand `data` over; `PeerLost` or `PeerTimeout` when that fails, after which the channel is closed."""
        ...

    async def receive(self, kind: str = "message") -> bytes:
        """The next message, whole; `PeerLost` when none will come, `PeerTimeout` when none came yet."""
        ...

    async def close(self) -> None:
        """Say goodbye; the other end's `receive` raises `PeerLost` after the last message. Twice is fine."""
        ...


def require_size(n_bytes: int, max_bytes: int, where: str) -> None:
    """Refuse a message by its announced length, before anything is allocated for it."""
    if n_bytes > max_bytes:
        cure = "Send fewer tokens or a coarser codec, or raise max_message_bytes"
        raise LimitExceeded(
            f"a message of {n_bytes} bytes {where} exceeds the limit of {max_bytes} bytes", cure=cure
        )
