"""The receiver as a second process of the operating system, reached by TCP on the loopback interface."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Timer
from typing import IO

from kvferry.errors import KvferryError, PeerLost

START_S = 180.0
"""Time for the process to import, load its model and listen."""
_STOP_S = 10.0


@dataclass(frozen=True)
class Peer:
    """Where the receiver listens, and its process id."""

    host: str
    port: int
    pid: int


@contextmanager
def receiver_process(sender: str, receiver: str, aligner: str | None) -> Iterator[Peer]:
    """Start `kvferry serve`, wait until it listens, and end it whatever happens."""
    options = ["--sender", sender, "--receiver", receiver, *(["--aligner", aligner] if aligner else [])]
    command = [sys.executable, "-m", "kvferry", "serve", *options, "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield _wait_for(process, errors)
        except KvferryError as error:
            error.add_note(f"The receiver process said:\n{_said(errors)}")
            raise
        finally:
            _stop(process)


def _wait_for(process: subprocess.Popen[str], errors: IO[str]) -> Peer:
    """The first line of its standard output says where it listens."""
    impatience = Timer(START_S, process.kill)
    impatience.start()
    try:
        line = process.stdout.readline() if process.stdout else ""
    finally:
        impatience.cancel()
    if not line:
        last = (_said(errors).splitlines() or [f"nothing for {START_S:g} s"])[-1]
        raise PeerLost("the receiver process did not start", cure=f"It said: {last.removeprefix('error: ')}")
    return Peer(**json.loads(line))


def _said(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read().strip()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
