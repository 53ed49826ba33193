"""What a message says of its tokens, one pair of functions per segment: positions, roles, spans. See also extent.py.

Each writer has one output per content, so a reader need not look for needless zeros or unmerged runs: `manifest.py`
writes again what it has read and compares. A default is not written at all: the writer then returns None.
Bytes are specified in docs/format.md.
"""

from itertools import groupby

import numpy as np
import torch
from jaxtyping import Int, UInt8

from kvferry.codec.bits import pack_codes, packed_length, unpack_codes
from kvferry.codec.varints import read_varints, unzigzag, write_varints, zigzag
from kvferry.errors import Malformed
from kvferry.kv import Geometry, Spans

_SPAN_NUMBERS = 3
_OVERLAP_BITS = 3


def shape_runs(geometry: Geometry) -> list[tuple[int, int, int, int]]:
    """`(layers, heads, key_dim, value_dim)` for each run of equal layers."""
    shapes = [(layer.heads, layer.key_dim, layer.value_dim) for layer in geometry.layers]
    return [(len(list(run)), *shape) for shape, run in groupby(shapes)]


def write_positions(positions: Int[np.ndarray, "axes tokens"]) -> bytes | None:
    """Per axis the runs of consecutive positions, as distance from the last one and length."""
    n_tokens = positions.shape[1]
    if len(positions) == 1 and (positions[0] == np.arange(n_tokens)).all():
        return None
    parts = [np.array([len(positions)]), *(_position_runs(row) for row in positions)]
    return write_varints(np.concatenate(parts))


def _position_runs(row: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " numbers"]:
    starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 2) != 1)
    lengths = np.diff(starts, append=len(row))
    ends = row[starts] + lengths
    gaps = row[starts] - np.concatenate([[0], ends[:-1]])[: len(starts)]
    pairs = np.stack([zigzag(gaps), lengths], axis=1)
    return np.concatenate([[len(starts)], pairs.ravel()])


def read_positions(body: bytes | None, n_tokens: int) -> Int[np.ndarray, "axes tokens"]:
    if body is None:
        return np.arange(n_tokens)[None]
    numbers = read_varints(body)
    if not 0 < numbers[:1].sum() <= len(numbers):
        raise Malformed(f"POSITIONS of {len(numbers)} numbers", cure="Write axes and the runs of each axis")
    rows, at = [], 1
    for _ in range(int(numbers[0])):
        end = at + 1 + 2 * int(numbers[at]) if at < len(numbers) else at
        rows.append(_expand_runs(numbers[at + 1 : end], n_tokens))
        at = end
    return np.stack(rows)


def _expand_runs(pairs: Int[np.ndarray, " numbers"], n_tokens: int) -> Int[np.ndarray, " tokens"]:
    gaps, lengths = unzigzag(pairs[0::2]), pairs[1::2]
    if len(pairs) % 2 or lengths.sum() != n_tokens:
        raise Malformed(f"POSITIONS for {lengths.sum()} of {n_tokens} tokens", cure="Place each token once")
    starts = np.cumsum(gaps + np.concatenate([[0], lengths[:-1]])[: len(lengths)])
    first = np.cumsum(lengths) - lengths
    return np.arange(n_tokens) + np.repeat(starts - first, lengths)


def write_roles(roles: UInt8[np.ndarray, " tokens"]) -> bytes | None:
    """Runs of equal roles; None where every token is text."""
    if not roles.any():
        return None
    starts = np.flatnonzero(np.diff(roles.astype(np.int64), prepend=-1))
    lengths = np.diff(starts, append=len(roles))
    return write_varints(np.stack([roles[starts].astype(np.int64), lengths], axis=1).ravel())


def read_roles(body: bytes | None, n_tokens: int) -> UInt8[np.ndarray, " tokens"]:
    if body is None:
        return np.zeros(n_tokens, np.uint8)
    numbers = read_varints(body)
    roles, lengths = numbers[0::2], numbers[1::2]
    if len(numbers) % 2 or lengths.sum() != n_tokens or roles.max(initial=0) > 255:
        raise Malformed(
            f"ROLES for {lengths.sum()} of {n_tokens} tokens", cure="Give each token one role below 256"
        )
    return np.repeat(roles, lengths).astype(np.uint8)


def write_overlaps(overlap: UInt8[np.ndarray, " tokens"] | None) -> bytes | None:
    """Three bits a token; None on the sender's own grid."""
    return None if overlap is None else pack_codes(torch.from_numpy(overlap), _OVERLAP_BITS).numpy().tobytes()


def read_overlaps(body: bytes | None, n_tokens: int) -> UInt8[np.ndarray, " tokens"] | None:
    if body is None:
        return None
    if len(body) != packed_length(n_tokens, _OVERLAP_BITS):
        what = f"OVERLAPS of {len(body)} bytes for {n_tokens} tokens"
        raise Malformed(what, cure=f"Write {_OVERLAP_BITS} bits per token")
    packed = torch.from_numpy(np.frombuffer(body, np.uint8).copy())
    return unpack_codes(packed, _OVERLAP_BITS, n_tokens).numpy()


def write_spans(spans: Spans) -> bytes:
    """Per token the distance of its part and start from the token before, and its length."""
    part, start, end = (column.astype(np.int64) for column in (spans.part, spans.start, spans.end))
    columns = [np.diff(part, prepend=0), np.diff(start, prepend=0), end - start]
    return write_varints(zigzag(np.stack(columns, axis=1).ravel()))


def read_spans(
    body: bytes | None,
    roles: UInt8[np.ndarray, " tokens"],
    overlap: UInt8[np.ndarray, " tokens"] | None = None,
) -> Spans:
    if body is None:
        nowhere = np.zeros(len(roles), np.int32)
        return Spans(nowhere, nowhere, nowhere, roles, overlap)
    numbers = unzigzag(read_varints(body))
    if len(numbers) != _SPAN_NUMBERS * len(roles):
        what = f"SPANS of {len(numbers)} numbers for {len(roles)} tokens"
        raise Malformed(what, cure=f"Write {_SPAN_NUMBERS} per token")
    columns = numbers.reshape(-1, _SPAN_NUMBERS)
    part, start = np.cumsum(columns[:, 0]), np.cumsum(columns[:, 1])
    end = start + columns[:, 2]
    if max(int(np.abs(column).max(initial=0)) for column in (part, start, end)) >= 1 << 31:
        raise Malformed("SPANS reaches beyond 2**31", cure="Split the text into parts")
    return Spans(part.astype(np.int32), start.astype(np.int32), end.astype(np.int32), roles, overlap)
