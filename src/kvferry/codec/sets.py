"""A set of tokens in as few bytes as it needs: a range, a bitmap, or the gaps between members in Rice codes.

Rice codes: R. F. Rice, "Some practical universal noiseless coding techniques", JPL Publication 79-22, 1979. A gap g is
g >> k in unary and the k low bits; here the low bits of all gaps stand before the unary parts of all gaps, so that both
are read as arrays. Bytes are specified in docs/format.md.
"""

from typing import NoReturn

import numpy as np
from jaxtyping import Bool, Int

from kvferry.errors import Malformed
from kvferry.wire.varint import read_varint, write_varint

_RANGE, _BITMAP, _MEMBERS, _OTHERS = range(4)
_MODE_BITS = 2


def write_set(row: Bool[np.ndarray, " tokens"]) -> bytes:
    """The shortest of all ways; of equally short ones the lowest mode.

    >>> [len(write_set(np.arange(128) % every == 0)) for every in (2, 16, 128)]
    [17, 7, 3]
    """
    held = np.flatnonzero(row)
    start, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
    forms = [bytes([_BITMAP]) + np.packbits(row, bitorder="little").tobytes()]
    if stop - start == len(held):
        forms.insert(0, bytes([_RANGE]) + write_varint(start) + write_varint(stop - start))
    for mode, members in ((_MEMBERS, held), (_OTHERS, np.flatnonzero(~row))):
        # A gap takes a bit at least: most of these need not be tried.
        if len(members) < 8 * min(len(form) for form in forms):
            forms.append(_write_gaps(mode, members))
    return min(forms, key=len)


def read_set(view: memoryview, offset: int, n_tokens: int) -> tuple[Bool[np.ndarray, " tokens"], int]:
    """The set at `offset` and the offset behind it; `Malformed` if it is cut or reaches beyond the tokens.

    >>> read_set(memoryview(write_set(np.arange(9) > 4)), 0, 9)[0].nonzero()[0].tolist()
    [5, 6, 7, 8]
    """
    head, offset = read_number(view, offset)
    mode, k = head % (1 << _MODE_BITS), head >> _MODE_BITS
    if k and mode in (_RANGE, _BITMAP):
        raise Malformed(f"a set of mode {mode} with parameter {k}", cure="Only Rice codes have one")
    if mode == _BITMAP:
        return _read_bitmap(view, offset, n_tokens)
    row = np.full(n_tokens, mode == _OTHERS)
    if mode == _RANGE:
        start, offset = read_number(view, offset)
        length, offset = read_number(view, offset)
        if start + length > n_tokens:
            _refuse(f"a range reaches {start + length} of {n_tokens} tokens")
        row[start : start + length] = True
        return row, offset
    members, offset = _read_gaps(view, offset, k, n_tokens)
    row[members] = mode == _MEMBERS
    return row, offset


def read_number(view: memoryview, offset: int) -> tuple[int, int]:
    """The varint at `offset` and the offset behind it; `Malformed` if it is cut."""
    found = read_varint(view, offset)
    if found is None:
        _refuse("a number is cut")
    return found


def _read_bitmap(view: memoryview, offset: int, n_tokens: int) -> tuple[Bool[np.ndarray, " tokens"], int]:
    end = offset + (n_tokens + 7) // 8
    if end > len(view):
        _refuse(f"a bitmap ends at byte {end} of {len(view)}")
    bits = np.unpackbits(np.frombuffer(view[offset:end], np.uint8), bitorder="little")
    return bits[:n_tokens].astype(bool), end


def _write_gaps(mode: int, members: Int[np.ndarray, " members"]) -> bytes:
    gaps = np.diff(members, prepend=-1) - 1
    k = _parameter(gaps)
    low = (gaps[:, None] >> np.arange(k) & 1).astype(bool).ravel()
    unary = np.zeros(len(gaps) + int((gaps >> k).sum()), bool)
    unary[np.cumsum((gaps >> k) + 1) - 1] = True
    bits = np.packbits(np.concatenate([low, unary]), bitorder="little")
    return write_varint(mode | k << _MODE_BITS) + write_varint(len(gaps)) + bits.tobytes()


def _parameter(gaps: Int[np.ndarray, " members"]) -> int:
    """The k of fewest bytes, the lowest of equals."""
    ks = range(int(gaps.max(initial=0)).bit_length() + 1)
    sizes = [(len(gaps) * (1 + k) + int((gaps >> k).sum()) + 7) // 8 for k in ks]
    return sizes.index(min(sizes))


def _read_gaps(
    view: memoryview, offset: int, k: int, n_tokens: int
) -> tuple[Int[np.ndarray, " members"], int]:
    count, offset = read_number(view, offset)
    # Where k is the best parameter, gaps of 2**(k-1) and more fit `count` times: no more than 3 bits a token to unfold.
    if count > n_tokens or (k and (k > n_tokens.bit_length() or count << (k - 1) >= n_tokens)):
        _refuse(f"{count} gaps of parameter {k} among {n_tokens} tokens")
    longest = count * (k + 1) + (n_tokens >> k)
    bits = np.unpackbits(np.frombuffer(view[offset : offset + longest // 8 + 1], np.uint8), bitorder="little")
    ends = np.flatnonzero(bits[count * k :])[:count]
    if len(ends) < count:
        _refuse(f"{len(ends)} of {count} gaps are there")
    low = bits[: count * k].reshape(count, k).astype(np.int64) @ (1 << np.arange(k))
    gaps = low + (np.diff(ends, prepend=-1) - 1 << k)
    members = np.cumsum(gaps + 1) - 1
    if count and members[-1] >= n_tokens:
        _refuse(f"gaps reach token {members[-1]} of {n_tokens}")
    n_bits = count * k + int(ends[-1]) + 1 if count else 0
    return members, offset + (n_bits + 7) // 8


def _refuse(what: str) -> NoReturn:
    raise Malformed(f"a set of tokens: {what}", cure="Write each set whole and stay inside the message")
