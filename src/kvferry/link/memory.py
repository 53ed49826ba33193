"""Two ends of a channel inside one process: no socket, no framing, the same behaviour."""

import asyncio

from kvferry.errors import PeerLost, PeerTimeout
from kvferry.link.channel import MAX_MESSAGE_BYTES, TIMEOUT_S, Channel, Meter, require_size


class MemoryChannel:
    """One end of a `memory_pair`."""

    _peer: "MemoryChannel"

    def __init__(self, timeout_s: float, max_message_bytes: int) -> None:
        self.meter = Meter()
        self._timeout_s, self._max_message_bytes = timeout_s, max_message_bytes
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the peer has closed
        self._closed = False

    async def send(self, data: bytes, kind: str = "message") -> None:
        require_size(len(data), self._max_message_bytes, "to send")
        if self._closed or self._peer._closed:
            raise _gone()
        self._peer._inbox.put_nowait(data)
        self.meter.sent[kind] += len(data)

    async def receive(self, kind: str = "message") -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await self._inbox.get()
        except TimeoutError:
            cure = "Allow more time or see why the other end does not send"
            raise PeerTimeout(f"no message came within {self._timeout_s:g} s", cure=cure) from None
        if data is None:
            self._inbox.put_nowait(None)
            raise _gone()
        self.meter.received[kind] += len(data)
        return data

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbox.put_nowait(None)
            self._peer._inbox.put_nowait(None)


def memory_pair(
    *, timeout_s: float = TIMEOUT_S, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> tuple[Channel, Channel]:
    """Two channels, each the peer of the other."""
    left, right = (MemoryChannel(timeout_s, max_message_bytes) for _ in range(2))
    left._peer, right._peer = right, left
    return left, right


def _gone() -> PeerLost:
    return PeerLost("one end of the memory channel is closed", cure="Make a new pair")
