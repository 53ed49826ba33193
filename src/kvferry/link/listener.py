"""The end that waits: an open port, and a handler for each connection that comes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvferry.errors import CannotListen, KvferryError, PeerLost
from kvferry.link.channel import MAX_MESSAGE_BYTES, TIMEOUT_S, Channel
from kvferry.link.tcp import PIECE_BYTES, TcpChannel, reason, require_usable

Handler = Callable[[Channel], Awaitable[None]]

_logger = logging.getLogger(__name__)


class Listener:
    """An open port and the connections being served on it. Leaving `async with` closes both."""

    def __init__(self, server: asyncio.Server, serving: set[asyncio.Task[None]]) -> None:
        self._server, self._serving = server, serving
        self.port: int = server.sockets[0].getsockname()[1]
        """The port that was taken, also where 0 was asked for."""

    async def serve_forever(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Take no more connections and end those that are open."""
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def __aenter__(self) -> "Listener":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def listen(
    host: str,
    port: int,
    handler: Handler,
    *,
    timeout_s: float = TIMEOUT_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Listener:
    """Serve every connection with `handler(channel)`, then close it. Port 0 takes a free one.

    Whatever a handler raises is logged and ends its own connection only. A handler that computes for long should do
    so in a thread (`asyncio.to_thread`): nothing else moves meanwhile, and the timeouts of others run on.
    """
    require_usable(port, max_message_bytes)
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = TcpChannel(reader, writer, timeout_s, max_message_bytes)
        task = asyncio.create_task(_serve(channel, handler))
        serving.add(task)
        task.add_done_callback(serving.discard)
        task.add_done_callback(lambda _: writer.close())  # also where it was cancelled before it began

    try:
        return Listener(await asyncio.start_server(serve, host, port, limit=PIECE_BYTES), serving)
    except OSError as error:
        cure = "Choose another port (0 takes a free one) and an address of this machine"
        raise CannotListen(f"cannot listen on {host}:{port}: {reason(error)}", cure=cure) from None


async def _serve(channel: TcpChannel, handler: Handler) -> None:
    try:
        await handler(channel)
    except KvferryError as error:
        left_in_peace = isinstance(error, PeerLost) and channel.resting
        _logger.log(logging.INFO if left_in_peace else logging.WARNING, "serving %s: %s", channel.peer, error)
    except Exception:
        _logger.exception("serving %s failed", channel.peer)
    finally:
        await channel.close()
