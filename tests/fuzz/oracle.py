"""What must hold for any bytes whatever."""

import sys
import tracemalloc
import warnings
from functools import cache
from types import ModuleType

import pytest
import torch

import contract
from fuzz.seeds import NOBODY, Seed, seeds
from kvferry.codec import decode, integer_fast
from kvferry.errors import KvferryError, UsageError
from kvferry.kv import KV
from kvferry.session.message import text_of
from kvferry.session.survey import survey
from kvferry.wire import (
    Frame,
    Limits,
    MessageKind,
    Reassembly,
    pack,
    read_json,
    unpack,
    unpack_prefix,
)

LIMITS = Limits(
    max_bytes=1 << 16, max_tokens=1 << 10, max_elements=1 << 16, max_segments=64, max_json=1 << 12
)
BOUND = LIMITS.max_bytes + 4 * LIMITS.max_elements
"""Bytes that Python and numpy may hold above the frame."""


def be_strict() -> None:
    """In this process a warning is a finding, and small frames take the compiled way too."""
    warnings.simplefilter("error")
    integer_fast.SMALLEST = 0


def check(seed: Seed, data: bytes) -> str:
    """What became of these bytes: the name of the error, or "read"; anything else that is raised is a finding."""
    try:
        frame = unpack(data, LIMITS, seed.agreements, seed.key)
        assert pack(frame, seed.key) == data, "not canonical"
        _read(seed, frame)
    except KvferryError as error:
        if isinstance(error, UsageError) or not error.cure:
            raise AssertionError("an error that blames the caller, or without a cure") from error
        return type(error).__name__
    return "read"


def check_aside(seed: Seed, data: bytes) -> None:
    """Readers that are content with less."""
    try:
        prefix = unpack_prefix(data, LIMITS, seed.agreements)
        assert prefix.n_bytes_used <= len(data)
    except KvferryError:
        pass
    survey(data, seed.key, LIMITS)


def check_paths(seed: Seed, data: bytes) -> None:
    """Compiled loops and plain ones give the same error or the same numbers, to the bit."""
    compiled = _decoded(seed, data)
    with pytest.MonkeyPatch.context() as patch:
        for module in _users_of_numba():
            patch.setattr(module, "available", lambda: False)
        plain = _decoded(seed, data)
    if isinstance(compiled, KV) and isinstance(plain, KV):
        contract.same(compiled, plain)
    else:
        assert compiled is plain, f"{compiled} compiled, {plain} plain"


@cache
def _users_of_numba() -> list[ModuleType]:
    """Modules that ask whether it is there; the seeds have loaded them all."""
    seeds()
    return [
        m for name, m in sys.modules.items() if name.startswith("kvferry.codec") and hasattr(m, "available")
    ]


def check_memory(seed: Seed, data: bytes) -> None:
    tracemalloc.start()
    try:
        check(seed, data)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak <= BOUND, f"{peak} bytes held, the bound is {BOUND}"
    finally:
        tracemalloc.stop()


def check_datagrams(datagrams: list[bytes]) -> str:
    """Any datagrams in any order: a message is whole or does not come."""
    reassembly, outcome = Reassembly(LIMITS), "waiting"
    for datagram in datagrams:
        try:
            if reassembly.add(datagram) is not None:
                outcome = "read"
        except KvferryError as error:
            outcome = type(error).__name__
    return outcome


def _decoded(seed: Seed, data: bytes) -> KV | type[KvferryError] | None:
    try:
        frame = unpack(data, LIMITS, seed.agreements, seed.key)
        return decode(frame, seed.geometry or NOBODY, LIMITS) if frame.kind == MessageKind.KV else None
    except KvferryError as error:
        return type(error)


def _read(seed: Seed, frame: Frame) -> None:
    if frame.kind == MessageKind.KV:
        _read_cache(seed, frame)
    elif frame.kind == MessageKind.TEXT:
        _read_text(frame)
    else:
        read_json(frame, LIMITS)


def _read_cache(seed: Seed, frame: Frame) -> None:
    kv = decode(frame, seed.geometry or NOBODY, LIMITS)
    assert (kv.n_batch, kv.n_tokens) == (1, frame.n_tokens)
    for group in kv.groups:
        assert bool(torch.isfinite(group.keys).all()), "keys are not finite"
        assert bool(torch.isfinite(group.values).all()), "values are not finite"


def _read_text(frame: Frame) -> None:
    assert len(text_of(frame, LIMITS)) <= LIMITS.max_bytes
