"""TCP by asyncio streams. On the wire: the length as u32, little endian, then that many bytes; nothing else.

Rule 1: a length is checked against the limit before anything is allocated; a buffer grows only with what came.
Rule 2: a timeout is a limit on silence, not on the whole message: it starts anew whenever bytes move.
Rule 3: a stream that broke inside a message is never used for another one in that direction.
"""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvferry.errors import LinkError, PeerLost, PeerTimeout, UsageError
from kvferry.link.channel import MAX_MESSAGE_BYTES, TIMEOUT_S, Meter, require_size

_LENGTH = struct.Struct("<I")
_MOST_BYTES = (1 << 32) - 1  # what the length can say
PIECE_BYTES = 1 << 18  # what moves between two looks at the clock


class TcpChannel:
    """One connection, seen from one end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self.meter = Meter()
        self.peer = _address(writer.get_extra_info("peername"))
        self.resting = True
        """No message is half received: the moment when a peer may leave without loss."""
        self._reader, self._writer = reader, writer
        self._timeout_s, self._max_message_bytes = timeout_s, max_message_bytes

    async def send(self, data: bytes, kind: str = "message") -> None:
        require_size(len(data), self._max_message_bytes, f"to {self.peer}")
        try:
            await self._write(_LENGTH.pack(len(data)), "framing")
            await self._write(data, kind)
        except BaseException:
            self._writer.transport.abort()  # rule 3
            raise

    async def receive(self, kind: str = "message") -> bytes:
        if not self.resting:
            raise LinkError(f"the stream from {self.peer} broke inside a message", cure="Connect again")
        (n_bytes,) = _LENGTH.unpack(await self._read(_LENGTH.size, "framing"))
        require_size(n_bytes, self._max_message_bytes, f"from {self.peer}")
        data = await self._read(n_bytes, kind)
        self.resting = True
        return data

    async def close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._writer.wait_closed()
        except OSError:  # gone already, or too slow to take the rest
            self._writer.transport.abort()

    async def _write(self, data: bytes, kind: str) -> None:
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            async with self._patience(f"{start} of {len(view)} bytes of the {kind} sent"):
                self._writer.write(piece)
                await self._writer.drain()
            self.meter.sent[kind] += len(piece)

    async def _read(self, n_bytes: int, kind: str) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            progress = f"{len(data)} of {n_bytes} bytes of the {kind} received"
            async with self._patience(progress):
                piece = await self._reader.read(min(n_bytes - len(data), PIECE_BYTES))
            if not piece:
                raise _lost(self.peer, f"closed the connection; {progress}")
            self.resting = False
            self.meter.received[kind] += len(piece)
            data += piece
        return bytes(data)

    @asynccontextmanager
    async def _patience(self, progress: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            cure = "Allow more time or check the network"
            raise PeerTimeout(
                f"{self.peer} was silent for {self._timeout_s:g} s; {progress}", cure=cure
            ) from None
        except OSError as error:
            raise _lost(self.peer, f"is gone ({reason(error)}); {progress}") from None


async def connect(
    host: str, port: int, *, timeout_s: float = TIMEOUT_S, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> TcpChannel:
    """Reach a listener. The limit holds for each message, in both directions."""
    require_usable(port, max_message_bytes)
    cure = "Start the receiver there first, or correct the address"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=PIECE_BYTES)
    except TimeoutError:
        raise PeerTimeout(f"{host}:{port} did not answer within {timeout_s:g} s", cure=cure) from None
    except OSError as error:
        raise PeerLost(f"cannot reach {host}:{port}: {reason(error)}", cure=cure) from None
    return TcpChannel(reader, writer, timeout_s, max_message_bytes)


def require_usable(port: int, max_message_bytes: int) -> None:
    if not 0 <= port <= 0xFFFF:
        raise UsageError(f"port {port} does not exist", cure="Choose one from 0 to 65535")
    if not 0 < max_message_bytes <= _MOST_BYTES:
        cure = f"Choose one from 1 to {_MOST_BYTES}"
        raise UsageError(f"a limit of {max_message_bytes} bytes per message is not possible", cure=cure)


def _address(name: tuple[str, int] | None) -> str:
    return f"{name[0]}:{name[1]}" if name else "a peer already gone"


def reason(error: OSError) -> str:
    code = error.errno or 0  # below zero for a host name that means nothing
    return os.strerror(code) if code > 0 else str(error.strerror or error)


def _lost(peer: str, how: str) -> PeerLost:
    return PeerLost(f"{peer} {how}", cure="See why it stopped, then connect and send again")
