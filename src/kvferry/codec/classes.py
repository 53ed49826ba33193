"""Precision classes of the tokens, for codecs that code some finer than others. Class 0 is not sent.

A row (keys or values of one layer) names its classes and then, from the highest to the second lowest, the set of tokens
of that class among those still left (sets.py): ages become ranges, a few chosen tokens Rice codes, a mixture bitmaps.
Bytes are specified in docs/format.md.
"""

from itertools import groupby

import numpy as np
from jaxtyping import Bool, UInt8

from kvferry.codec.sets import read_number, read_set, write_set
from kvferry.errors import Malformed
from kvferry.wire.varint import write_varint

MAX_CLASS = 15
_AS_KEYS = 1
"""A mask of class 0 alone, which no row has: the values are of the same classes as the keys."""


def write_classes(classes: UInt8[np.ndarray, "layers 2 tokens"]) -> bytes | None:
    """The body of CLASSES: per run of equal layers the rows of keys and values. None where every class is 0 or 1.

    >>> write_classes(np.array([[[1, 1, 2]] * 2] * 9, np.uint8)).hex()
    '0906010401'
    """
    if (classes <= 1).all():
        return None
    body = b""
    for _, run in groupby(classes, key=lambda layer: layer.tobytes()):
        layers = list(run)
        keys, values = layers[0]
        same = bool((keys == values).all())
        body += write_varint(len(layers)) + _write_row(keys)
        body += write_varint(_AS_KEYS) if same else _write_row(values)
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
    while offset < len(view):
        count, offset = read_number(view, offset)
        held = present[layer : layer + count]
        if not 0 < count == len(held) or (held != held[0]).any():
            what = f"CLASSES joins {count} layers from layer {layer} of {len(present)} on"
            raise Malformed(what, cure="Join layers that hold equal tokens, and name each layer once")
        mask, offset = read_number(view, offset)
        keys, offset = _read_row(view, offset, mask, held[0])
        mask, offset = read_number(view, offset)
        values, offset = (keys, offset) if mask == _AS_KEYS else _read_row(view, offset, mask, held[0])
        classes[layer : layer + count] = np.stack([keys, values])
        layer += count
    if body is not None and layer != len(present):
        raise Malformed(f"CLASSES names {layer} of {len(present)} layers", cure="Name each layer once")
    return classes


def _write_row(row: UInt8[np.ndarray, " tokens"]) -> bytes:
    left = row[row > 0]
    found = [int(number) for number in np.unique(left)]
    body = write_varint(sum(1 << number for number in found))
    for number in found[:0:-1]:
        body += write_set(left == number)
        left = left[left != number]
    return body


def _read_row(
    view: memoryview, offset: int, mask: int, held: Bool[np.ndarray, " tokens"]
) -> tuple[UInt8[np.ndarray, " tokens"], int]:
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
