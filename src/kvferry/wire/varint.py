"""Whole numbers in as few bytes as they need: seven bits a byte, lowest first, the top bit says "more follows"."""

from kvferry.errors import Malformed

MAX_VARINT_BYTES = 9
"""63 bits: fits a signed 64-bit integer everywhere."""


def write_varint(value: int) -> bytes:
    """The one encoding of `value`, 0 <= value < 2**63.

    >>> write_varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def read_varint(view: memoryview, offset: int) -> tuple[int, int] | None:
    """The value at `offset` and the offset behind it; None if the bytes end before the value does.

    >>> read_varint(memoryview(bytes.fromhex("ac02")), 0)
    (300, 2)
    """
    value = 0
    for index, byte in enumerate(view[offset : offset + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if byte == 0 and index:
                raise Malformed(
                    f"the number at byte {offset} ends in a needless zero byte", cure="Write it minimally"
                )
            return value, offset + index + 1
    if len(view) - offset >= MAX_VARINT_BYTES:
        raise Malformed(
            f"the number at byte {offset} is longer than {MAX_VARINT_BYTES} bytes",
            cure="Write numbers below 2**63",
        )
    return None
