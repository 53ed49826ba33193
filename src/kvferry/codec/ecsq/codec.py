"""Entropy-coded uniform scalar quantisation with frozen tables: the codec for the fewest bytes at equal quality.

    numbers of a channel -(- mean)-(/ step)-(round)-> whole numbers -(table of the channel's level)-> rANS

One step for the whole frame, times a weight for each layer's keys and values: with entropy coding behind it, a uniform
step spends bits where the variance is (reverse water-filling). Nothing is clipped. Keys must carry no rotation: their
means, which are most of their size, are only constant in content space.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int64

from kvferry.codec.base import Codec, kept, spec_segment
from kvferry.codec.ecsq.encoder import own_side
from kvferry.codec.ecsq.layout import Part, parts_of
from kvferry.codec.ecsq.measured import Measured, Reads, Writes, measure_part
from kvferry.codec.ecsq.part import NOTHING, Coded, PartReader, code_part
from kvferry.codec.ecsq.search import finest
from kvferry.codec.ecsq.side import Side, grid_of
from kvferry.codec.ecsq.source import Arrays, Quantised, part_symbols, part_values, write_through
from kvferry.codec.ecsq.weights import Weighting, exponents, read_weights, weigh, write_weights
from kvferry.codec.manifest import Manifest, Uses, kv_frame, manifest_of, read_manifest
from kvferry.errors import BadSpec, Malformed
from kvferry.kv import KV, Geometry, Group, KeySpace, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes
from kvferry.wire.header import Header

MAX_STEP = 1024
"""64ths of an octave, either way: from 1/65,536 of a deviation to 65,536 of them."""


@dataclass(frozen=True, repr=False)
class Ecsq(Codec):
    """`step`: the finest step allowed, 2**(step/64) deviations of what it is weighted by; a cap makes it coarser.

    `weighting`: one weight for each layer's keys and values (layer), one for all keys and one for all values (part),
    or one for all (frame).

    >>> Ecsq(step=-128)
    ecsq(step=-128, weighting=layer)
    """

    name: ClassVar[str] = "ecsq"
    spaces: ClassVar[tuple[KeySpace, ...]] = ("content",)
    step: int = -64
    weighting: Weighting = "layer"

    def __post_init__(self) -> None:
        if not -MAX_STEP <= self.step <= MAX_STEP or self.weighting not in ("layer", "part", "frame"):
            what = f"ecsq(step={self.step}, weighting={self.weighting})"
            raise BadSpec(what, cure=f"step is within {MAX_STEP}, weighting layer, part or frame")

    def said_by(self, header: Header) -> Codec:
        return replace(self, step=header.step)

    def unsaid(self) -> Codec:
        return replace(self, step=type(self).step)

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        kv.require_space("content")
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep, None if plan is None else plan.classes)
        arrays = Reads(kv, 0, np.flatnonzero(keep.any(0).cpu().numpy()))
        measured = [measure_part(part, arrays) for part in parts_of(manifest)]
        if not all(part.finite for part in measured):
            replace(kv, present=keep.unsqueeze(1)).require_finite()  # names layer, head and token
        message = _Message(self, manifest, measured, arrays)
        if max_bytes is None:
            return message.frame(self.step)
        return finest(self.step, MAX_STEP, max_bytes, message.n_bytes, message.frame)

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        manifest = read_manifest(frame, geometry, limits, Uses(step=True, classes=True, weights=True))
        weights = read_weights(frame.body(SegmentType.WEIGHTS), geometry.n_layers, self.weighting)
        parts, bodies = parts_of(manifest), frame.bodies(SegmentType.PAYLOAD)
        if [bool(part.blocks) for part in parts] != [bool(body) for body in bodies]:
            raise Malformed(f"{len(bodies)} parts, or an empty one", cure=f"These tokens make {len(parts)}")
        groups = _zeros(geometry, manifest.n_tokens)
        for part, body in zip(parts, bodies, strict=True):
            if part.blocks:
                _read_part(
                    part, body, self.step + exponents(part.blocks, weights, self.weighting), Writes(groups)
                )
        return manifest.cache(tuple(_to(group, device) for group in groups), device)

    @torch.no_grad()
    def roundtrip(self, kv: KV) -> KV:
        coded = [self._through(kv, row) for row in range(kv.n_batch)]
        groups = zip(kv.groups, *coded, strict=True)
        return kv.with_groups(tuple(_batch(kv, group.layers, rows) for group, *rows in groups))

    def _through(self, kv: KV, row: int) -> tuple[Group, ...]:
        """One sequence of a batch, coded and decoded in its slots."""
        one = kv.take_batch([row])
        manifest = manifest_of(one, one.present[:, 0])
        index = np.flatnonzero(one.present[:, 0].any(0).cpu().numpy())
        source, groups = Reads(one, 0, index), _zeros(kv.geometry, len(index))
        measured = [measure_part(part, source) for part in parts_of(manifest)]
        message = _Message(self, manifest, measured, source)
        for part in measured:
            if part.part.blocks:
                write_through(
                    message.quantised(part, message.side(part, self.step), self.step), source, Writes(groups)
                )
        return tuple(_spread(group, index, kv.n_tokens) for group in groups)


@dataclass(frozen=True, eq=False)
class _Message:
    """A measured cache, to be written at any step."""

    codec: Ecsq
    manifest: Manifest
    measured: list[Measured]
    arrays: Arrays

    @cached_property
    def weights(self) -> list[int]:
        return weigh(self.measured, self.manifest.geometry.n_layers, self.codec.weighting)

    def frame(self, step: int) -> Frame:
        bodies = [part.body() for part in self._coded(step)]
        payload = [Segment(SegmentType.PAYLOAD, body) for body in bodies]
        geometry, n_tokens = self.manifest.geometry, self.manifest.n_tokens
        return kv_frame(geometry, n_tokens, (*self._head(), *payload), step=step)

    def n_bytes(self, step: int) -> int:
        """The length of the message at a step, a byte or two off."""
        lengths = [len(segment.body) for segment in self._head()]
        return packed_bytes([*lengths, *(part.n_bytes for part in self._coded(step))])

    def side(self, measured: Measured, step: int) -> Side:
        return own_side(measured, self._exponent(measured.part, step))

    def quantised(self, measured: Measured, side: Side, step: int) -> Quantised:
        return Quantised(measured.part, grid_of(side, self._exponent(measured.part, step)))

    def _exponent(self, part: Part, step: int) -> Int64[np.ndarray, " channels"]:
        return step + exponents(part.blocks, self.weights, self.codec.weighting)

    def _head(self) -> tuple[Segment, ...]:
        spec = spec_segment(self.codec)
        return (spec, *self.manifest.segments(), Segment(SegmentType.WEIGHTS, write_weights(self.weights)))

    def _coded(self, step: int) -> list[Coded]:
        return [self._code(measured, step) if measured.part.blocks else NOTHING for measured in self.measured]

    def _code(self, measured: Measured, step: int) -> Coded:
        side = self.side(measured, step)
        quantised = self.quantised(measured, side, step)
        symbols, raw = part_symbols(quantised, self.arrays)
        return code_part(side, quantised.rows, symbols, raw)


def _read_part(part: Part, body: bytes, exponent: Int64[np.ndarray, " channels"], arrays: Arrays) -> None:
    n_numbers = int((part.size * (part.counts + 2)).sum())
    reader = PartReader(body, len(part.blocks), n_numbers)
    quantised = Quantised(part, grid_of(reader.side(part.size, part.counts), exponent))
    part_values(quantised, reader.symbols(quantised.rows), reader.raw, arrays)
    reader.close()


def _zeros(geometry: Geometry, n_tokens: int) -> tuple[Group, ...]:
    shapes = [(layers, geometry.layers[layers[0]]) for layers in geometry.groups()]
    return tuple(
        Group(
            layers,
            torch.zeros(len(layers), 1, shape.heads, n_tokens, shape.key_dim),
            torch.zeros(len(layers), 1, shape.heads, n_tokens, shape.value_dim),
        )
        for layers, shape in shapes
    )


def _to(group: Group, device: torch.device) -> Group:
    return Group(group.layers, group.keys.to(device), group.values.to(device))


def _spread(group: Group, index: Int64[np.ndarray, " tokens"], n_tokens: int) -> Group:
    """Tokens back to their slots; the others are zero."""
    if len(index) == n_tokens:
        return group
    slots = torch.from_numpy(index)
    keys, values = (x.new_zeros(*x.shape[:3], n_tokens, x.shape[-1]) for x in (group.keys, group.values))
    keys[:, :, :, slots], values[:, :, :, slots] = group.keys, group.values
    return Group(group.layers, keys, values)


def _batch(kv: KV, layers: tuple[int, ...], rows: list[Group]) -> Group:
    keys = torch.cat([row.keys for row in rows], 1).to(kv.device)
    return Group(layers, keys, torch.cat([row.values for row in rows], 1).to(kv.device))
