"""Precision classes of the tokens, for codecs that code some finer than others. Class 0 is not sent.

A row (keys or values of one layer) names its classes and then, from the highest to the second lowest, the set of tokens
of that class among those still left (sets.py): ages become ranges, a few chosen tokens Rice codes, a mixture bitmaps.
A row that is the last one written so, moved by some classes, is one byte: layers may weigh the same tokens differently.
Bytes are specified in docs/format.md.
"""

from itertools import groupby

import numpy as np
from jaxtyping import Bool, UInt8

from kvferry.codec.sets import read_number, read_set, write_set
from kvferry.errors import Malformed
from kvferry.wire.varint import write_varint

MAX_CLASS = 15
_MOVES = sorted(range(1 - MAX_CLASS, MAX_CLASS), key=lambda move: (abs(move), move > 0))
"""In order of their zigzag codes."""

Row = UInt8[np.ndarray, " tokens"]


def write_classes(classes: UInt8[np.ndarray, "layers 2 tokens"]) -> bytes | None:
    """The body of CLASSES: per run of equal layers the rows of keys and values. None where every class is 0 or 1.

    >>> write_classes(np.array([[[1, 1, 2]] * 2] * 9, np.uint8)).hex()
    '0906010401'
    """
    if (classes <= 1).all():
        return None
    body, written = b"", None
    for _, run in groupby(classes, key=lambda layer: layer.tobytes()):
        layers = list(run)
        body += write_varint(len(layers))
        for row in layers[0]:
            moved = None if written is None else _move_between(written, row)
            body += _write_row(row) if moved is None else write_varint(_as_mask(moved))
            written = row if moved is None else written
    return body


def read_classes(
    body: bytes | None, present: Bool[np.ndarray, "layers tokens"]
) -> UInt8[np.ndarray, "layers 2 tokens"]:
    """The inverse: 1 to 15 where a layer holds a token, 0 elsewhere; `Malformed` for anything that is not whole.

    >>> read_classes(bytes.fromhex("0106010401"), np.ones((1, 3), bool)).tolist()
    [[[1, 1, 2], [1, 1, 2]]]
    """
    classes = np.repeat(present[:, None].astype(np.uint8), 2, axis=1)
    view, offset, layer = memoryview(body or b""), 0, 0
    written: Row | None = None
    while offset < len(view):
        count, offset = read_number(view, offset)
        held = present[layer : layer + count]
        if not 0 < count == len(held) or (held != held[0]).any():
            what = f"CLASSES joins {count} layers from layer {layer} of {len(present)} on"
            raise Malformed(what, cure="Join layers that hold equal tokens, and name each layer once")
        for which in (0, 1):
            mask, offset = read_number(view, offset)
            if mask & 1:
                row = _moved_row(written, mask, held[0])
            else:
                row, offset = _read_row(view, offset, mask, held[0])
                written = row
            classes[layer : layer + count, which] = row
        layer += count
    if body is not None and layer != len(present):
        raise Malformed(f"CLASSES names {layer} of {len(present)} layers", cure="Name each layer once")
    return classes


def _as_mask(move: int) -> int:
    """A mask with class 0, which no row has: the last written row, moved."""
    return (2 * move if move >= 0 else -2 * move - 1) << 1 | 1


def _move(row: Row, by: int) -> Row:
    """Classes of the tokens that are held, moved, within 1 to 15."""
    moved = np.clip(row.astype(np.int64) + by, 1, MAX_CLASS)
    return np.where(row > 0, moved, 0).astype(np.uint8)


def _move_between(written: Row, row: Row) -> int | None:
    """By how much the row that was written last must be moved to become this one; None if it cannot."""
    if not row.any() or ((written > 0) != (row > 0)).any():
        return None
    return next((move for move in _MOVES if np.array_equal(_move(written, move), row)), None)


def _moved_row(written: Row | None, mask: int, held: Bool[np.ndarray, " tokens"]) -> Row:
    code = mask >> 1
    move = code >> 1 if not code & 1 else -(code + 1 >> 1)
    if written is None or abs(move) >= MAX_CLASS or ((written > 0) != held).any():
        what = f"CLASSES moves a row by {move} where none of these tokens was written"
        raise Malformed(what, cure="Write a row whole before one that is moved")
    return _move(written, move)


def _write_row(row: Row) -> bytes:
    left = row[row > 0]
    found = [int(number) for number in np.unique(left)]
    body = write_varint(sum(1 << number for number in found))
    for number in found[:0:-1]:
        body += write_set(left == number)
        left = left[left != number]
    return body


def _read_row(view: memoryview, offset: int, mask: int, held: Bool[np.ndarray, " tokens"]) -> tuple[Row, int]:
    left = np.flatnonzero(held)
    if mask & 1 or mask >> (MAX_CLASS + 1) or (mask > 0) != (len(left) > 0):
        what = f"CLASSES {mask:#x} for {len(left)} tokens"
        raise Malformed(what, cure=f"Name the classes that occur, of 1 to {MAX_CLASS}")
    numbers = [number for number in range(MAX_CLASS, 0, -1) if mask >> number & 1]
    row = np.zeros(len(held), np.uint8)
    for number in numbers[:-1]:
        members, offset = read_set(view, offset, len(left))
        row[left[members]] = number
        left = left[~members]
    row[left] = numbers[-1] if numbers else 0
    return row, offset
