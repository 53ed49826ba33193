"""How far a cache reaches: the segments SHAPE and TOKENS. Free of torch, so that a message can be measured without it.

Each writer has one output per content; a default is not written at all: the writer then returns None. Bytes are
specified in docs/format.md.
"""

from itertools import groupby
from typing import Literal

import numpy as np
from jaxtyping import Bool

from kvferry.codec.sets import read_number, read_set, write_set
from kvferry.codec.varints import read_varints, write_varints
from kvferry.errors import Malformed
from kvferry.wire.varint import write_varint

KeySpace = Literal["content", "rotated"]
_SPACES: tuple[KeySpace, ...] = ("content", "rotated")


def write_shape(runs: list[tuple[int, int, int, int]], space: KeySpace, call_length: int) -> bytes:
    numbers = [_SPACES.index(space), call_length, *(number for run in runs for number in run)]
    return write_varints(np.array(numbers, np.int64))


def read_shape(body: bytes) -> tuple[list[tuple[int, int, int, int]], KeySpace, int]:
    numbers = read_varints(body).tolist()
    if len(numbers) % 4 != 2 or numbers[0] >= len(_SPACES):
        raise Malformed(
            f"SHAPE of {len(numbers)} numbers", cure="Write key space, call length and runs of four"
        )
    runs = [tuple(numbers[at : at + 4]) for at in range(2, len(numbers), 4)]
    return runs, _SPACES[numbers[0]], numbers[1]


def write_tokens(present: Bool[np.ndarray, "layers tokens"]) -> bytes | None:
    """Which layers hold which tokens: per run of equal layers a set in its shortest form (sets.py)."""
    if present.all():
        return None
    runs = groupby(present, key=lambda row: row.tobytes())
    rows = [(next(run), 1 + sum(1 for _ in run)) for _, run in runs]
    return b"".join(write_varint(count) + write_set(row) for row, count in rows)


def read_tokens(body: bytes | None, n_layers: int, n_tokens: int) -> Bool[np.ndarray, "layers tokens"]:
    if body is None:
        return np.broadcast_to(np.True_, (n_layers, n_tokens))
    view, offset = memoryview(body), 0
    rows: list[Bool[np.ndarray, " tokens"]] = []
    while offset < len(body):
        count, offset = read_number(view, offset)
        if not 0 < count <= n_layers - len(rows):
            raise Malformed(f"TOKENS names more than {n_layers} layers or none", cure="Name each layer once")
        row, offset = read_set(view, offset, n_tokens)
        rows += [row] * count
    if len(rows) != n_layers or not np.any(rows, axis=0).all():
        what = f"TOKENS names {len(rows)} of {n_layers} layers, or a token is in none"
        raise Malformed(what, cure="Name each layer once and count only tokens that are sent")
    return np.stack(rows)
