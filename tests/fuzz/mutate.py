"""From honest bytes to dishonest ones. Everything is drawn from the one generator that is handed in."""

from collections.abc import Callable, Sequence
from random import Random

NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**35,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
Mutation = Callable[[Random, bytearray, Sequence[bytes]], None]


def mutated(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes; `others` are what pieces may be taken from."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        random.choice(MUTATIONS)(random, found, others)
    return bytes(found)


def _flip(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _extreme(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))


def _insert(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    at = random.randint(0, len(data))
    data[at:at] = random.randbytes(random.choice((1, 1, 2, 7, 40)))


def _delete(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    first = random.randint(0, len(data))
    del data[first : first + random.choice((1, 1, 2, 7, 40))]


def _repeat(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    first = random.randint(0, len(data))
    data[first:first] = data[first : first + random.choice((1, 4, 30))]


def _truncate(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    del data[random.randint(0, len(data)) :]


def _splice(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = random.choice(others)
    first, length = random.randint(0, len(other)), random.choice((1, 4, 30, 200))
    at = random.randint(0, len(data))
    data[at : at + random.choice((0, length))] = other[first : first + length]


def _number(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    """An extreme number in little-endian, or as a varint."""
    at, value = random.randint(0, len(data)), random.choice(NUMBERS) + random.choice((-1, 0, 0, 1))
    if random.random() < 0.5:
        width = random.choice((2, 4, 8))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    else:
        data[at : at + random.choice((0, 1, 2))] = varint(max(value, 0))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


MUTATIONS: tuple[Mutation, ...] = (_flip, _extreme, _insert, _delete, _repeat, _truncate, _splice, _number)
