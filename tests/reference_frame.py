"""Header, segments, shape, tokens and classes of a message, read as docs/format.md says: for `reference.py`."""

import struct
from dataclasses import dataclass, field

import xxhash


class Refused(Exception):
    """A message that the page says to refuse."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


@dataclass
class Bytes:
    """Bytes read from the front."""

    data: bytes
    at: int = 0

    def take(self, n: int) -> bytes:
        require(self.at + n <= len(self.data), f"{n} bytes at {self.at} of {len(self.data)}")
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        number, shift = 0, 0
        while True:
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                require(shift == 7 or byte > 0, "a needless byte")
                require(number < 1 << 63, "a varint beyond 2^63")
                return number

    @property
    def left(self) -> int:
        return len(self.data) - self.at


@dataclass
class Bits:
    """Bits of a string of bytes, lowest first."""

    data: bytes
    at: int = 0

    def take(self, n: int) -> int:
        require(self.at + n <= 8 * len(self.data), "too few bits")
        number = 0
        for place in range(n):
            bit = self.at + place
            number |= (self.data[bit // 8] >> bit % 8 & 1) << place
        self.at += n
        return number

    def close(self) -> None:
        left = 8 * len(self.data) - self.at
        require(left < 8 and self.take(left) == 0, "bits are left")


def unzigzag(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number + 1) // 2


def low32(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) % 2**32


@dataclass
class Header:
    step: int
    n_tokens: int
    profile: int
    receivers_grid: bool = False
    segments: list[tuple[int, bytes]] = field(default_factory=list)

    def body(self, kind: int) -> bytes | None:
        return next((body for one, body in self.segments if one == kind), None)


def read_frame(data: bytes) -> Header:
    """A KV frame of type I in the full form, not sealed."""
    require(len(data) >= 64, "no header")
    magic, major, _, kind, flags, step, distance = struct.unpack_from("<4sBBBBhH", data)
    frame_id, n_tokens, reference, *hashes, check = struct.unpack_from("<IIQQQQQI", data, 12)
    require((magic, major, kind, flags & ~2) == (b"\x89KVW", 1, 1, 0), "another frame")
    require((distance, reference) == (0, 0) and frame_id >= 0, "a reference in an I frame")
    require(check == low32(data[:60]), "checksum of the header")
    header = Header(step, n_tokens, hashes[3], flags == 2)
    rest, last = Bytes(data, 64), 0
    while True:
        start = rest.at
        kind, flags = rest.take(2)
        length = rest.varint()
        front = data[start : rest.at]
        (check,) = struct.unpack("<I", rest.take(4))
        body = rest.take(length)
        require(check == low32(front + body) and flags < 2 and kind >= last, "a segment")
        last = kind
        if kind == 255:
            end = Bytes(body)
            require(end.varint() == len(header.segments), "count of segments")
            require(struct.unpack("<Q", end.take(8))[0] == xxhash.xxh3_64_intdigest(data[:start]), "digest")
            require(end.left == 0 and rest.left == 0, "bytes behind END")
            return header
        header.segments.append((kind, body))


def read_overlaps_of(header: Header) -> list[int] | None:
    """How each token lies to those that it was pooled from; None on the sender's grid."""
    body = header.body(9)
    require((body is not None) == header.receivers_grid, "OVERLAPS on the other grid")
    if body is None:
        return None
    bits = Bits(body)
    found = [bits.take(3) for _ in range(header.n_tokens)]
    bits.close()
    return found


def read_set(data: Bytes, n: int) -> list[int]:
    """The members of a set of n tokens, ascending."""
    head = data.varint()
    mode, k = head % 4, head // 4
    if mode == 0:
        start = data.varint()
        return list(range(start, start + data.varint()))
    if mode == 1:
        bits = Bits(data.take((n + 7) // 8))
        return [token for token in range(n) if bits.take(1)]
    count = data.varint()
    bits = Bits(data.data, 8 * data.at)
    gaps = [bits.take(k) for _ in range(count)]
    for index in range(count):
        while not bits.take(1):
            gaps[index] += 1 << k
    data.at = (bits.at + 7) // 8
    found, token = [], -1
    for gap in gaps:
        token += gap + 1
        found.append(token)
    return found if mode == 2 else [token for token in range(n) if token not in found]


def read_shape(body: bytes) -> list[tuple[int, int, int]]:
    """Heads, key channels and value channels of each layer."""
    data, layers = Bytes(body), []
    require(data.varint() == 0, "rotated keys")
    data.varint()
    while data.left:
        count, heads, keys, values = (data.varint() for _ in range(4))
        layers += [(heads, keys, values)] * count
    return layers


def read_tokens(body: bytes | None, n_layers: int, n_tokens: int) -> list[list[int]]:
    """The tokens that each layer holds."""
    if body is None:
        return [list(range(n_tokens))] * n_layers
    data, layers = Bytes(body), []
    while data.left:
        count = data.varint()
        layers += [read_set(data, n_tokens)] * count
    require(len(layers) == n_layers, "TOKENS for other layers")
    return layers


Classes = dict[int, int]
"""Token to class."""


def read_classes(body: bytes | None, held: list[list[int]]) -> list[tuple[Classes, Classes]]:
    """Of keys and values of each layer."""
    if body is None:
        return [(dict.fromkeys(tokens, 1), dict.fromkeys(tokens, 1)) for tokens in held]
    data, layers = Bytes(body), []
    whole: Classes = {}
    while data.left:
        count, rows = data.varint(), []
        tokens = held[len(layers)]
        for _ in ("keys", "values"):
            mask = data.varint()
            if mask % 2:
                code = mask // 2
                move = code // 2 if code % 2 == 0 else -(code + 1) // 2
                rows.append({token: min(max(one + move, 1), 15) for token, one in whole.items()})
            else:
                whole = read_row(data, mask, tokens)
                rows.append(whole)
        layers += [(rows[0], rows[1])] * count
    return layers


def read_row(data: Bytes, mask: int, tokens: list[int]) -> Classes:
    left, found = list(tokens), {}
    numbers = [number for number in range(15, 0, -1) if mask >> number & 1]
    for number in numbers[:-1]:
        members = [left[place] for place in read_set(data, len(left))]
        found.update(dict.fromkeys(members, number))
        left = [token for token in left if token not in members]
    return {**found, **dict.fromkeys(left, numbers[-1])} if numbers else found
