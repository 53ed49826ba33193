"""The link on real sockets, files and processes: what goes in comes out and is counted, or is refused by type."""

import asyncio
import logging
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from kvferry.errors import (
    BadSpec,
    CannotListen,
    KvferryError,
    LimitExceeded,
    LinkError,
    PeerLost,
    PeerTimeout,
    UsageError,
)
from kvferry.link import (
    Channel,
    Listener,
    Meter,
    connect,
    listen,
    memory_pair,
    read_message,
    write_message,
)

HOST = "127.0.0.1"
SIZES = [0, 1, 3, 4, 65_535, 65_536, 1 << 18, (1 << 18) + 1, 3_000_000]


def some_bytes(n_bytes: int) -> bytes:
    return random.Random(n_bytes).randbytes(n_bytes)


async def echo(channel: Channel) -> None:
    """Send every message back until the peer leaves."""
    while True:
        await channel.send(await channel.receive())


@asynccontextmanager
async def raw_server(behave: Callable[..., Awaitable[None]]) -> AsyncIterator[int]:
    """A server below the link: it reads and writes bytes as it likes."""
    server = await asyncio.start_server(behave, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def raw_client(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.close()


class Kept:
    """A handler that receives once and keeps what came, or what was raised."""

    def __init__(self) -> None:
        self.outcome: asyncio.Queue[bytes | KvferryError] = asyncio.Queue()

    async def __call__(self, channel: Channel) -> None:
        try:
            self.outcome.put_nowait(await channel.receive())
        except KvferryError as error:
            self.outcome.put_nowait(error)
            raise


# ---- the contract of every channel ---------------------------------------------------------------------------------


@asynccontextmanager
async def memory_ends(timeout_s: float, max_message_bytes: int) -> AsyncIterator[tuple[Channel, Channel]]:
    yield memory_pair(timeout_s=timeout_s, max_message_bytes=max_message_bytes)


@asynccontextmanager
async def tcp_ends(timeout_s: float, max_message_bytes: int) -> AsyncIterator[tuple[Channel, Channel]]:
    accepted: asyncio.Queue[Channel] = asyncio.Queue()

    async def hold(channel: Channel) -> None:
        accepted.put_nowait(channel)
        await asyncio.Event().wait()

    limits = {"timeout_s": timeout_s, "max_message_bytes": max_message_bytes}
    async with await listen(HOST, 0, hold, **limits) as server:
        client = await connect(HOST, server.port, **limits)
        yield client, await accepted.get()
        await client.close()


both_kinds = pytest.mark.parametrize("ends", [memory_ends, tcp_ends])


@both_kinds
async def test_messages_arrive_whole_and_in_order(ends: Callable) -> None:
    async with ends(5, 1 << 23) as (left, right):

        async def send_all() -> None:
            for size in SIZES:
                await left.send(some_bytes(size))

        sending = asyncio.create_task(send_all())
        assert [await right.receive() == some_bytes(size) for size in SIZES] == [True] * len(SIZES)
        await sending


@both_kinds
async def test_both_directions_at_once(ends: Callable) -> None:
    data = some_bytes(2_000_000)
    async with ends(5, 1 << 23) as (left, right):
        results = await asyncio.gather(left.send(data), right.send(data), left.receive(), right.receive())
    assert results[2:] == [data, data]


@both_kinds
async def test_kinds_are_counted_apart_and_equally_at_both_ends(ends: Callable) -> None:
    async with ends(5, 1 << 20) as (left, right):
        await left.send(b"x" * 7, "hello")
        await left.send(b"x" * 100)
        assert (len(await right.receive("hello")), len(await right.receive())) == (7, 100)
        assert left.meter.sent == right.meter.received
        assert left.meter.sent["hello"] == 7
        assert left.meter.sent["message"] == 100
        assert left.meter.received.total() == 0


@both_kinds
async def test_a_peer_that_closed_is_lost_after_its_last_message(ends: Callable) -> None:
    async with ends(5, 1 << 20) as (left, right):
        await left.send(b"last words")
        await left.close()
        await left.close()
        assert await right.receive() == b"last words"
        for _ in range(2):
            with pytest.raises(PeerLost):
                await right.receive()


@both_kinds
async def test_a_closed_channel_sends_no_more(ends: Callable) -> None:
    async with ends(5, 1 << 20) as (left, _):
        await left.close()
        with pytest.raises(PeerLost):
            await left.send(b"x")


@both_kinds
async def test_silence_times_out_and_may_be_waited_out(ends: Callable) -> None:
    async with ends(0.2, 1 << 20) as (left, right):
        with pytest.raises(PeerTimeout, match=r"0\.2 s"):
            await right.receive()
        await left.send(b"late")
        assert await right.receive() == b"late"


@both_kinds
async def test_a_message_above_the_limit_is_not_sent(ends: Callable) -> None:
    async with ends(5, 1000) as (left, right):
        with pytest.raises(LimitExceeded, match=r"1001 bytes .* limit of 1000 bytes"):
            await left.send(bytes(1001))
        assert left.meter.total_bytes == 0
        await left.send(bytes(1000))
        assert await right.receive() == bytes(1000)


# ---- TCP: the bytes themselves -------------------------------------------------------------------------------------


async def test_the_wire_is_a_length_and_the_bytes_and_the_meter_counts_both() -> None:
    seen = bytearray()
    done = asyncio.Event()

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.read(-1))
        writer.close()
        done.set()

    async with raw_server(record) as port:
        channel = await connect(HOST, port)
        await channel.send(b"abc", "hello")
        await channel.send(some_bytes(1_000_000))
        await channel.close()
        await done.wait()
    assert seen == b"\x03\0\0\0abc" + struct.pack("<I", 1_000_000) + some_bytes(1_000_000)
    assert channel.meter.sent == {"framing": 8, "hello": 3, "message": 1_000_000}
    assert channel.meter.total_bytes == len(seen)


async def test_a_message_may_come_byte_by_byte() -> None:
    kept = Kept()
    async with await listen(HOST, 0, kept) as server, raw_client(server.port) as (_, writer):
        for byte in b"\x05\0\0\0abcde":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert await kept.outcome.get() == b"abcde"


async def test_an_oversized_length_is_refused_before_anything_is_allocated() -> None:
    kept = Kept()
    listening = await listen(HOST, 0, kept, max_message_bytes=1000)
    async with listening as server, raw_client(server.port) as (reader, writer):
        writer.write(struct.pack("<I", 0xFFFF_FFFF))
        error = await kept.outcome.get()
        assert isinstance(error, LimitExceeded)
        assert "4294967295" in str(error)
        assert "1000" in str(error)
        assert await reader.read() == b""


async def test_a_stream_that_broke_inside_a_message_is_not_read_again() -> None:
    errors: asyncio.Queue[KvferryError] = asyncio.Queue()

    async def insist(channel: Channel) -> None:
        for _ in range(2):
            try:
                await channel.receive()
            except KvferryError as error:
                errors.put_nowait(error)

    async with (
        await listen(HOST, 0, insist, timeout_s=0.05) as server,
        raw_client(server.port) as (_, writer),
    ):
        writer.write(struct.pack("<I", 8) + b"half")
        assert isinstance(await errors.get(), PeerTimeout)
        assert "broke inside a message" in str(await errors.get())


# ---- TCP: peers that fail ------------------------------------------------------------------------------------------

DIES_WHILE_SENDING = """
import socket, struct, sys, time
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peer.sendall(struct.pack("<I", 1000) + bytes(300))
print("ready", flush=True)
time.sleep(60)
"""
DIES_WHILE_RECEIVING = """
import asyncio, sys
from kvferry.link import listen
async def main():
    async def stall(channel):
        print("ready", flush=True)
        await asyncio.sleep(60)
    async with await listen("127.0.0.1", 0, stall) as server:
        print(server.port, flush=True)
        await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


async def next_line(child: subprocess.Popen[str]) -> str:
    return (await asyncio.to_thread(child.stdout.readline)).strip()


async def test_a_sender_killed_mid_message_is_lost_with_the_bytes_that_came() -> None:
    kept = Kept()
    async with await listen(HOST, 0, kept) as server:
        with process(DIES_WHILE_SENDING, server.port) as child:
            assert await next_line(child) == "ready"
            child.send_signal(signal.SIGKILL)
            error = await kept.outcome.get()
        assert isinstance(error, PeerLost)
        assert "300 of 1000 bytes" in str(error)
        await still_serves(server, kept)


async def test_a_receiver_killed_mid_message_is_lost_to_the_sender() -> None:
    with process(DIES_WHILE_RECEIVING) as child:
        channel = await connect(HOST, int(await next_line(child)))
        assert await next_line(child) == "ready"
        sending = asyncio.create_task(channel.send(bytes(64 << 20)))
        await asyncio.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        with pytest.raises(PeerLost, match=r"of 67108864 bytes of the message sent"):
            await sending
        await channel.close()
    assert 0 < channel.meter.sent["message"] < 64 << 20


async def still_serves(server: Listener, kept: Kept) -> None:
    channel = await connect(HOST, server.port)
    await channel.send(b"still there?")
    assert await kept.outcome.get() == b"still there?"
    await channel.close()


async def test_a_peer_that_stops_mid_message_times_out() -> None:
    kept = Kept()
    async with await listen(HOST, 0, kept, timeout_s=0.05) as server, raw_client(server.port) as (_, writer):
        writer.write(struct.pack("<I", 1000) + bytes(10))
        error = await kept.outcome.get()
    assert isinstance(error, PeerTimeout)
    assert "10 of 1000 bytes" in str(error)


async def test_a_slow_peer_is_no_silent_peer() -> None:
    kept = Kept()
    async with await listen(HOST, 0, kept, timeout_s=0.6) as server, raw_client(server.port) as (_, writer):
        writer.write(struct.pack("<I", 10))
        for byte in bytes(10):  # 0.9 s in all
            await asyncio.sleep(0.09)
            writer.write(bytes([byte]))
        assert await kept.outcome.get() == bytes(10)


async def test_a_peer_that_takes_nothing_times_the_sender_out() -> None:
    over = asyncio.Event()

    async def stall(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        await over.wait()
        writer.transport.abort()

    async with raw_server(stall) as port:
        channel = await connect(HOST, port, timeout_s=0.1)
        with pytest.raises(PeerTimeout, match=r"of 67108864 bytes of the message sent"):
            await channel.send(bytes(64 << 20))
        with pytest.raises(PeerLost):
            await channel.send(b"after half a message")
        await channel.close()
        over.set()
        await asyncio.sleep(0)


async def test_a_cancelled_message_is_never_followed_by_another() -> None:
    async with tcp_ends(5, 1 << 30) as (left, right):
        sending = asyncio.create_task(left.send(bytes(64 << 20)))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(PeerLost):
            await right.receive()


# ---- TCP: the listener ---------------------------------------------------------------------------------------------


async def test_many_clients_at_once() -> None:
    async def client(port: int, number: int) -> int:
        channel = await connect(HOST, port)
        for turn in range(5):
            data = some_bytes(number * 1000 + turn)
            await channel.send(data)
            assert await channel.receive() == data
        await channel.close()
        return channel.meter.total_bytes

    async with await listen(HOST, 0, echo) as server:
        totals = await asyncio.gather(*(client(server.port, number) for number in range(50)))
    assert totals == [2 * sum(number * 1000 + turn + 4 for turn in range(5)) for number in range(50)]


@pytest.mark.parametrize("error", [BadSpec("a bad spec", cure="Write a good one"), ZeroDivisionError()])
async def test_a_handler_that_raises_is_logged_and_ends_its_connection_only(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_on_request(channel: Channel) -> None:
        if await channel.receive() == b"fail":
            raise error
        await channel.send(b"fine")

    async with await listen(HOST, 0, fail_on_request) as server:
        for request, reply in [(b"fail", None), (b"work", b"fine")]:
            channel = await connect(HOST, server.port)
            await channel.send(request)
            if reply is None:
                with pytest.raises(PeerLost):
                    await channel.receive()
            else:
                assert await channel.receive() == reply
            await channel.close()
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.name == "kvferry.link.listener"


async def test_a_client_that_leaves_between_messages_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvferry")
    async with await listen(HOST, 0, echo) as server:
        channel = await connect(HOST, server.port)
        await channel.send(b"x")
        await channel.receive()
        await channel.close()
        await asyncio.sleep(0.1)
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_closing_the_listener_ends_the_connections_it_serves() -> None:
    async with await listen(HOST, 0, echo) as server:
        channel = await connect(HOST, server.port)
        await channel.send(b"x")
        await channel.receive()
    with pytest.raises(PeerLost):
        await channel.receive()
    await channel.close()
    with pytest.raises(PeerLost, match="Connection refused"):
        await connect(HOST, server.port)


async def test_a_port_in_use_is_named_with_a_cure() -> None:
    async with await listen(HOST, 0, echo) as server:
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{server.port}: .*in use.*0 takes a free one"):
            await listen(HOST, server.port, echo)


async def test_a_foreign_address_cannot_be_listened_on() -> None:
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1:0"):
        await listen("192.0.2.1", 0, echo)


async def test_a_host_that_means_nothing_is_lost() -> None:
    with pytest.raises(PeerLost, match=r"no\.such\.host\.invalid:80"):
        await connect("no.such.host.invalid", 80)


@pytest.mark.parametrize(("port", "limit"), [(-1, 10), (65_536, 10), (0, 0), (0, 1 << 32)])
async def test_impossible_ports_and_limits_are_refused(port: int, limit: int) -> None:
    for start in (
        connect(HOST, port, max_message_bytes=limit),
        listen(HOST, port, echo, max_message_bytes=limit),
    ):
        with pytest.raises(UsageError):
            await start


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_the_message_and_the_meter_counts_it(tmp_path: Path, size: int) -> None:
    path, data, meter = tmp_path / "m.kvw", some_bytes(size), Meter()
    write_message(path, data, meter)
    assert path.stat().st_size == size == meter.sent["message"]
    assert read_message(path, meter) == data
    assert meter.received["message"] == size
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_message_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "m.kvw", threading.Event(), set()
    write_message(path, b"a" * 100_000, Meter())

    def watch() -> None:
        while not stop.is_set():
            data = read_message(path, Meter())
            seen.add((data[:1], len(data), len(set(data))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(100):
        write_message(path, b"ab"[turn % 2 : turn % 2 + 1] * (100_000 + turn % 2), Meter())
    stop.set()
    watcher.join()
    assert seen <= {(b"a", 100_000, 1), (b"b", 100_001, 1)}


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    meter = Meter()
    write_message(tmp_path / "m.kvw", bytes(1001), Meter())
    with pytest.raises(LimitExceeded, match=r"1001 bytes in .*m\.kvw .* 1000 bytes"):
        read_message(tmp_path / "m.kvw", meter, max_message_bytes=1000)
    assert meter.total_bytes == 0


def test_what_the_disk_refuses_is_a_link_error_with_the_path(tmp_path: Path) -> None:
    meter = Meter()
    with pytest.raises(LinkError, match=r"absent/m\.kvw: No such file"):
        write_message(tmp_path / "absent" / "m.kvw", b"x", meter)
    with pytest.raises(LinkError, match=r"m\.kvw: No such file"):
        read_message(tmp_path / "m.kvw", meter)
    with pytest.raises(LinkError, match="Is a directory"):
        write_message(tmp_path, b"x", meter)
    with pytest.raises(LinkError, match="Is a directory"):
        read_message(tmp_path, meter)
    assert meter.total_bytes == 0
    assert list(tmp_path.iterdir()) == []


NO_ROOM = """
import pathlib, resource, sys
from kvferry.errors import LinkError
from kvferry.link import Meter, write_message
path = pathlib.Path(sys.argv[1])
write_message(path, b"old", Meter())
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_message(path, bytes(5000), Meter())
except LinkError as error:
    print(error)
"""


def test_without_room_the_old_message_stays_and_no_part_is_left(tmp_path: Path) -> None:
    path = tmp_path / "m.kvw"
    said = subprocess.run([sys.executable, "-c", NO_ROOM, path], capture_output=True, text=True, check=True)
    assert "cannot write 5000 bytes" in said.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
