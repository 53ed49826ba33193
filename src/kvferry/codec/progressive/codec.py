"""`ecsq` in layers: a message that can stop anywhere, and go on later.

    coarsest layer -> its cells in three -> each of those in three -> ...      chunk by chunk, what saves most first

Means, levels and weights are those of `ecsq`, from a profile or sent with the coarsest layer. Precision classes are
obeyed. All chunks together say what `ecsq` of the same step says, in a few per cent more bytes; the first of them say
what a coarser one does.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool

from kvferry.codec.ecsq.codec import Ecsq, spread, to_device
from kvferry.codec.ecsq.layout import Block, parts_of
from kvferry.codec.ecsq.measured import Writes
from kvferry.codec.ecsq.message import Message, empty_groups
from kvferry.codec.ecsq.scheme import Scheme
from kvferry.codec.ecsq.weights import Weighting
from kvferry.codec.estimate import Estimate
from kvferry.codec.manifest import Manifest, kv_frame
from kvferry.codec.profiles import NONE
from kvferry.codec.progressive.chunk import Place
from kvferry.codec.progressive.layered import Layered, climb, place_of
from kvferry.codec.progressive.order import refines
from kvferry.codec.progressive.reading import Reading
from kvferry.codec.progressive.rebuild import write_block
from kvferry.codec.progressive.stages import MAX_LAYERS
from kvferry.errors import BadSpec, BudgetTooSmall, Malformed
from kvferry.kv import KV, Geometry, Group, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes


@dataclass(frozen=True, repr=False)
class Progressive(Ecsq):
    """`step`, `weighting` and `profile` as for `ecsq`; `step` is that of the finest layer.

    `n_layers`: the coarsest layer's step is 3**(n_layers - 1) times as large.

    >>> Progressive(step=-64)
    progressive(step=-64, weighting=layer, profile=none, n_layers=3)
    """

    name: ClassVar[str] = "progressive"
    step: int = -96
    weighting: Weighting = "layer"
    profile: str = NONE
    n_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_layers <= MAX_LAYERS:
            raise BadSpec(f"progressive(n_layers={self.n_layers})", cure=f"Use 1 to {MAX_LAYERS}")

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        """The chunks that come first, and of the others what still fits. All blocks of the coarsest layer must."""
        manifest, message, layered = self._layered(kv, plan)
        bodies = _within(layered, [len(one.body) for one in message.before], max_bytes)
        segments = (*message.before, *(Segment(SegmentType.PAYLOAD, body) for body in bodies))
        hashed = self.profile_hash
        return kv_frame(kv.geometry, manifest.n_tokens, segments, step=self.step, profile_hash=hashed)

    def smallest(self, kv: KV, plan: Plan | None = None) -> int:
        _, message, layered = self._layered(kv, plan)
        return _least_bytes(layered, [len(one.body) for one in message.before])

    def estimate(self, kv: KV) -> Estimate:
        """The ideal bytes of all chunks of one sequence; levels and means at a byte a channel."""
        _, _, layered = self._layered(kv, None)
        side = sum(len(one.side.code) for one in layered.climbs if one.side is not None)
        return Estimate(sum(sum(one.n_bytes) for one in layered.climbs) - side, side)

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        """As far as the chunks go. A layer of which the coarsest keys or values did not come is absent."""
        manifest, scheme = self._opened(frame, geometry, limits)
        reading = self._read(frame, manifest, scheme)
        came = _came(reading, geometry.n_layers)
        groups = empty_groups(geometry, manifest.n_tokens, bool(manifest.present.all() and came.all()))
        writes = Writes(groups)
        for ladder, known in reading.known.values():
            if came[ladder.block.layer]:
                write_block(ladder, known, scheme.feedback, writes)
        there = replace(manifest, present=manifest.present & came[:, None])
        return there.cache(tuple(to_device(group, device) for group in groups), device)

    def _through(self, one: KV) -> tuple[Group, ...]:
        manifest, message, layered = self._layered(one, None)
        index = np.flatnonzero(one.present[:, 0].any(0).cpu().numpy())
        groups = empty_groups(one.geometry, len(index), bool(manifest.present.all()))
        writes = Writes(groups)
        for each in layered.climbs:
            write_block(each.ladder, each.known[-1], message.scheme.feedback, writes)
        return tuple(spread(group, index, one.n_tokens) for group in groups)

    def _layered(self, kv: KV, plan: Plan | None) -> tuple[Manifest, Message, Layered]:
        manifest, message = self._measured(kv, plan)
        depth = kv.geometry.n_layers
        climbs = climb(message, self.step, self.n_layers, depth)
        return manifest, message, Layered(climbs, 2 * depth, self.n_layers)

    def _read(self, frame: Frame, manifest: Manifest, scheme: Scheme) -> Reading:
        depth = manifest.geometry.n_layers
        blocks = {place_of(block, depth): block for block in _blocks(manifest)}
        reading = Reading(blocks, 2 * depth, scheme, frame.step, self.n_layers)
        bodies = frame.bodies(SegmentType.PAYLOAD)
        if not bodies or (not blocks and bodies != [b""]):
            what = f"{len(bodies)} chunks for {len(blocks)} blocks"
            raise Malformed(what, cure="Write one at least, empty where there are no tokens")
        for body in bodies if blocks else ():
            reading.take(body)
        return reading


def _blocks(manifest: Manifest) -> list[Block]:
    return [block for part in parts_of(manifest) for block in part.blocks]


def _came(reading: Reading, n_layers: int) -> Bool[np.ndarray, " layers"]:
    """The layers of which keys and values are known."""
    there = np.zeros((2, n_layers), np.bool_)
    there.reshape(-1)[list(reading.known)] = True
    return there[0] & there[1]


def _within(layered: Layered, before: list[int], max_bytes: int | None) -> list[bytes]:
    """The chunks that are written, within a cap."""
    if max_bytes is None:
        return [layered.body(place) for place in layered.order]
    least = _least_bytes(layered, before)
    if max_bytes < least:
        raise BudgetTooSmall(max_bytes, least)
    if not layered.climbs:
        return [b""]
    taken: dict[Place, bytes] = {}
    for place in layered.order:
        for start in place.starts():
            lengths = [*before, *map(len, taken.values())]
            if refines(start, taken) and layered.fits(start, lengths, max_bytes):
                taken[start] = layered.body(start)
                break
    return list(taken.values())


def _least_bytes(layered: Layered, before: list[int]) -> int:
    coarsest = [len(layered.body(place)) for place in layered.order if place.stage == 0]
    return packed_bytes([*before, *coarsest])
