"""A second decoder of `ecsq`, written from docs/format.md alone: plain loops, one number at a time.

It shares nothing with the first but the file of frozen tables. It is for small messages. What the page says a
reader must refuse in the numbers raises `Refused`; of the frame it checks less.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reference_frame import (
    Bits,
    Bytes,
    Classes,
    read_classes,
    read_frame,
    read_overlaps_of,
    read_shape,
    read_tokens,
    require,
    unzigzag,
)

TABLES = Path(__file__).parents[1] / "src/kvferry/codec/entropy/tables.bin"
SILENT = None
PART_NUMBERS = 2**18
F32 = np.float32
ZERO = F32(0)
WEIGHTINGS = {b"ecsq": "layer", b"ecsq(weighting=part)": "part", b"ecsq(weighting=frame)": "frame"}


# Frozen tables


@dataclass
class Table:
    reach: int
    frequencies: list[int]
    centroids: list[int]

    def find(self, slot: int) -> tuple[int, int, int]:
        """Symbol, start and frequency."""
        start = 0
        for symbol, frequency in enumerate(self.frequencies):
            if slot < start + frequency:
                return symbol, start, frequency
            start += frequency
        raise AssertionError("frequencies sum to 2^14")


REACH = [2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 6, 6, 7, 9, 10, 11, 13, 16, 18, 21, 25, 30, 35, 41]


def read_tables() -> list[Table]:
    numbers = [number for (number,) in struct.iter_unpack("<H", TABLES.read_bytes())]
    tables, at = [], 0
    for reach in REACH:
        tables.append(Table(reach, numbers[at : at + 2 * reach + 2], []))
        at += 2 * reach + 2
    for table in tables:
        table.centroids = numbers[at : at + 4]
        at += 4
    return tables


# Grid


def step_size(exponent: int) -> F32:
    mantissa = F32(2.0 ** (exponent % 64 / 64))
    return F32(np.float64(mantissa) * np.float64(2.0) ** (exponent // 64))


def shift_of(level: int) -> int:
    return max(0, -((12 - level) // 4))


@dataclass
class Channel:
    exponent: int
    level: int | None = SILENT
    mean: F32 = ZERO


@dataclass
class Block:
    layer: int
    which: int
    heads: int
    dim: int
    classes: Classes
    """Of the tokens that the layer holds."""
    channels: list[Channel] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.heads * self.dim


@dataclass
class Row:
    block: Block
    channel: int
    token_class: int

    @property
    def tokens(self) -> list[int]:
        return [token for token, one in sorted(self.block.classes.items()) if one == self.token_class]

    @property
    def level(self) -> int | None:
        level = self.block.channels[self.channel].level
        return SILENT if level is SILENT else max(level - 2 * (self.token_class - 1), -12)


def parts_of(
    shape: list[tuple[int, int, int]], held: list[list[int]], classes: list[tuple[Classes, Classes]]
) -> list[list[Block]]:
    parts: list[list[Block]] = [[]]
    for layer, (heads, *dims) in enumerate(shape):
        if sum(block.size * len(block.classes) for block in parts[-1]) >= PART_NUMBERS:
            parts.append([])
        if held[layer]:
            parts[-1] += [Block(layer, which, heads, dims[which], classes[layer][which]) for which in (0, 1)]
    return parts


def rows_of(blocks: list[Block]) -> Iterator[Row]:
    for block in blocks:
        for token_class in sorted({*block.classes.values()}):
            for channel in range(block.size):
                yield Row(block, channel, token_class)


# Entropy coding


@dataclass
class Stream:
    """States, words and raw bits of a part."""

    states: list[int]
    words: list[int]
    raw: Bits
    tables: list[Table]
    used: int = 0

    def run(self, rows: list[tuple[int, int]]) -> list[list[int]]:
        """The numbers of rows, given by level and length."""
        symbols, place = [], 0
        for level, length in rows:
            for _ in range(length):
                symbols.append((level, self.symbol(place % len(self.states), level)))
                place += 1
        numbers = self.numbers(symbols)
        return [[next(numbers) for _ in range(length)] for _, length in rows]

    def table(self, level: int) -> Table:
        return self.tables[level + 12 - 4 * shift_of(level)]

    def symbol(self, lane: int, level: int) -> int:
        state = self.states[lane]
        slot = state % 2**14
        symbol, start, frequency = self.table(level).find(slot)
        state = frequency * (state >> 14) + slot - start
        if state < 2**16:
            require(self.used < len(self.words), "words end")
            state = state * 2**16 + self.words[self.used]
            self.used += 1
        self.states[lane] = state
        return symbol

    def numbers(self, symbols: list[tuple[int, int]]) -> Iterator[int]:
        high = [symbol - self.table(level).reach for level, symbol in symbols]
        escapes = [i for i, (level, _) in enumerate(symbols) if high[i] > self.table(level).reach]
        lengths = [self.raw.take(5) for _ in escapes]
        signs = [self.raw.take(1) for _ in escapes]
        for i, n, sign in zip(escapes, lengths, signs, strict=True):
            level = symbols[i][0]
            size = self.table(level).reach + (1 << n) + self.raw.take(n)
            require(size < 1 << 31 - shift_of(level), "a number beyond 2^31")
            high[i] = -size if sign else size
        for h, (level, _) in zip(high, symbols, strict=True):
            shift = shift_of(level)
            yield (h << shift) - (1 << shift >> 1) + self.raw.take(shift)

    def close(self) -> None:
        require(self.used == len(self.words) and set(self.states) == {2**16}, "not at rest")
        self.raw.close()


def open_part(body: bytes, blocks: list[Block], has_side: bool) -> tuple[list[bytes], Stream]:
    """The heads of the blocks, and the stream behind them."""
    data = Bytes(body)
    (lane_bits,) = data.take(1)
    raw = data.varint()
    heads = [data.take(3) for _ in blocks if has_side]
    most = data.at + (4 << lane_bits) + 12 * sum(b.size * (len(b.classes) + 2) for b in blocks)
    require(lane_bits <= 8 and len(body) <= most, "a part of this length")
    states = list(struct.unpack(f"<{1 << lane_bits}I", data.take(4 << lane_bits)))
    middle = data.left - raw
    require(middle >= 0 and middle % 2 == 0, "half a word")
    words = list(struct.unpack(f"<{middle // 2}H", data.take(middle)))
    return heads, Stream(states, words, Bits(data.take(raw)), read_tables())


def read_side(blocks: list[Block], heads: list[bytes], stream: Stream) -> None:
    """Levels and means of all channels."""
    require(all(max(head[1:]) <= 120 for head in heads), "a level that does not exist")
    rows = [(byte - 12, block.size) for block, head in zip(blocks, heads, strict=True) for byte in head[1:]]
    found = iter(stream.run(rows))
    for block, (base, _, _) in zip(blocks, heads, strict=True):
        n_tokens = len(block.classes)
        grain = 2 if n_tokens < 64 else 1
        for channel, code, mean in zip(block.channels, next(found), next(found), strict=True):
            code += base
            level = -12 + (code - 1) * grain
            require(code >= 0 and level <= 108, "a level that does not exist")
            channel.level = level if code else SILENT
            octaves = -2
            if channel.level is not SILENT:
                octaves = max(-2, channel.level // 4 - max(0, n_tokens.bit_length() - 4) // 2)
            unit = F32(np.float64(step_size(channel.exponent)) * np.float64(2.0) ** octaves)
            with np.errstate(over="ignore"):
                channel.mean = F32(np.float64(mean) * np.float64(unit))


# Profiles


@dataclass
class Fitted:
    """A profile: numbers by channel, and its fingerprint."""

    deviation: list[int]
    mean: list[F32]
    weight: list[int]
    fingerprint: str


def read_profile(path: Path) -> Fitted:
    """A safetensors file: the length of a JSON object, the object, the tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    said, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = said.pop("__metadata__")
    names = ["deviation", "mean", "shaping", "weight"]
    require(sorted(said) == names == sorted(metadata["sections"].split()), "other sections")
    require(metadata["format"] == "kvferry.profile/1", "another format")
    content = {name: rest[slice(*said[name]["data_offsets"])] for name in names}
    who = " ".join(metadata[name] for name in ("format", "model", "geometry", "tokenizer"))
    deviation, weight = (
        [number for (number,) in struct.iter_unpack("<h", content[name])] for name in ("deviation", "weight")
    )
    mean = [F32(number) for (number,) in struct.iter_unpack("<f", content["mean"])]
    fingerprint = hashlib.sha256(who.encode() + b"".join(content[name] for name in names)).hexdigest()
    return Fitted(deviation, mean, weight, fingerprint)


def apply_profile(blocks: list[Block], shape: list[tuple[int, int, int]], step: int, profile: Fitted) -> None:
    for block in blocks:
        before = sum(heads * (keys + values) for heads, keys, values in shape[: block.layer])
        first = before + (block.heads * shape[block.layer][1] if block.which else 0)
        for index in range(first, first + block.size):
            exponent = step + profile.weight[index]
            level = min(max((profile.deviation[index] - exponent + 8) // 16, -12), 108)
            block.channels.append(Channel(exponent, level, profile.mean[index]))


# Messages


def read_weights(body: bytes | None, weighting: str, n_layers: int) -> list[int]:
    require(body is not None, "no WEIGHTS")
    data, weights = Bytes(body or b""), []
    while data.left:
        weights.append(unzigzag(data.varint()))
    wanted = {"layer": 2 * n_layers, "part": 2, "frame": 1}[weighting]
    require(len(weights) == wanted and all(abs(w) <= 1024 for w in weights), "weights")
    return weights


def apply_weights(blocks: list[Block], weights: list[int], weighting: str, step: int) -> None:
    for block in blocks:
        index = {"layer": 2 * block.layer + block.which, "part": block.which, "frame": 0}[weighting]
        block.channels = [Channel(step + 8 * weights[index]) for _ in range(block.size)]


def number_of(q: int, row: Row, table: Table) -> F32:
    """A number from how many steps it is from its mean."""
    channel = row.block.channels[row.channel]
    step = step_size(channel.exponent + 32 * (row.token_class - 1))
    y = F32(q)
    if abs(q) <= 3 and row.level is not SILENT and shift_of(row.level) == 0:
        y = F32(table.centroids[abs(q)] / 2**14 * (-1 if q < 0 else 1))
    return F32(y * step) + channel.mean


Arrays = dict[tuple[int, int], np.ndarray]
"""Layer and 0 for keys or 1 for values to float32 `[heads, tokens, dim]`."""


def decode(data: bytes, profile: Fitted | None = None) -> Arrays:
    """The numbers of a message; 0 where a layer does not hold a token."""
    frame = read_frame(data)
    spec = frame.body(1)
    require(spec in WEIGHTINGS and abs(frame.step) <= 1024, "another codec")
    weighting = WEIGHTINGS[spec or b""]
    require(frame.profile == (int(profile.fingerprint[:16], 16) if profile else 0), "another profile")
    require(profile is None or (weighting == "layer" and frame.body(8) is None), "weights beside a profile")
    read_overlaps_of(frame)
    shape = read_shape(frame.body(2) or b"")
    held = read_tokens(frame.body(3), len(shape), frame.n_tokens)
    parts = parts_of(shape, held, read_classes(frame.body(7), held))
    bodies = [body for kind, body in frame.segments if kind == 16]
    require([bool(blocks) for blocks in parts] == [bool(body) for body in bodies], "other parts")
    out = {
        (layer, which): np.zeros((heads, frame.n_tokens, dims[which]), np.float32)
        for layer, (heads, *dims) in enumerate(shape)
        for which in (0, 1)
    }
    for blocks, body in zip(parts, bodies, strict=True):
        if not blocks:
            continue
        heads, stream = open_part(body, blocks, profile is None)
        if profile is None:
            weights = read_weights(frame.body(8), weighting, len(shape))
            apply_weights(blocks, weights, weighting, frame.step)
            check(blocks)
            read_side(blocks, heads, stream)
        else:
            apply_profile(blocks, shape, frame.step, profile)
        check(blocks)
        read_numbers(blocks, stream, out)
        stream.close()
    return out


def check(blocks: list[Block]) -> None:
    """Refuse steps and means with which a number may not be finite."""
    for block in blocks:
        for channel in block.channels:
            require(channel.exponent <= 5632, "a step beyond 2^88")
            require(abs(channel.mean) < 2.0**126, "a mean beyond 2^126")


def read_numbers(blocks: list[Block], stream: Stream, out: Arrays) -> None:
    rows = list(rows_of(blocks))
    sent = [row for row in rows if row.level is not SILENT]
    sent.sort(key=lambda row: row.level + 12 - 4 * shift_of(row.level))
    for row, numbers in zip(sent, stream.run([(row.level, len(row.tokens)) for row in sent]), strict=True):
        write(row, [number_of(q, row, stream.table(row.level)) for q in numbers], out)
    for row in rows:
        if row.level is SILENT:
            write(row, [row.block.channels[row.channel].mean] * len(row.tokens), out)


def write(row: Row, numbers: list[F32], out: Arrays) -> None:
    head, place = divmod(row.channel, row.block.dim)
    for token, number in zip(row.tokens, numbers, strict=True):
        out[row.block.layer, row.block.which][head, token, place] = number
