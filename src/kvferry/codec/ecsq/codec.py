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
from kvferry.codec.ecsq.ideal import ideal
from kvferry.codec.ecsq.layout import parts_of
from kvferry.codec.ecsq.measured import Measured, Reads, Writes, measure_part
from kvferry.codec.ecsq.menu import menu_of
from kvferry.codec.ecsq.message import Message, Written, empty_groups, read_part
from kvferry.codec.ecsq.scheme import FromProfile, Scheme, SelfContained
from kvferry.codec.ecsq.search import finest
from kvferry.codec.ecsq.weights import Weighting, read_weights, weigh
from kvferry.codec.estimate import Estimate
from kvferry.codec.manifest import Manifest, Uses, kv_frame, manifest_of, read_manifest
from kvferry.codec.profile import Profile
from kvferry.codec.profiles import NONE, find_profile, name_of
from kvferry.errors import BadSpec, BudgetTooSmall, Malformed
from kvferry.kv import KV, Geometry, Group, KeySpace, Menu, Plan
from kvferry.wire import Frame, Limits, SegmentType, packed_bytes
from kvferry.wire.fields import STEPS_PER_OCTAVE
from kvferry.wire.header import Header

MAX_STEP = 1024
"""64ths of an octave, either way: from 1/65,536 of a deviation to 65,536 of them."""


_BELOW = 4 * STEPS_PER_OCTAVE


@dataclass(frozen=True, repr=False)
class Ecsq(Codec):
    """`step`: the finest step allowed, 2**(step/64) deviations of what it is weighted by; a cap makes it coarser.

    `weighting`: one weight for each layer's keys and values (layer), one for all keys and one for all values (part),
    or one for all (frame). `profile`: a file, the name of a shipped one, or `p` and 16 digits of its hash; it says
    means, deviations and weights of all channels, so that none are sent.

    >>> Ecsq(step=-128)
    ecsq(step=-128, weighting=layer, profile=none)
    """

    name: ClassVar[str] = "ecsq"
    spaces: ClassVar[tuple[KeySpace, ...]] = ("content",)
    step: int = -64
    weighting: Weighting = "layer"
    profile: str = NONE

    def __post_init__(self) -> None:
        if not -MAX_STEP <= self.step <= MAX_STEP or self.weighting not in ("layer", "part", "frame"):
            what = f"{self.name}(step={self.step}, weighting={self.weighting})"
            raise BadSpec(what, cure=f"step is within {MAX_STEP}, weighting layer, part or frame")
        if self.profile != NONE and self.weighting != "layer":
            what = f"{self.name}(weighting={self.weighting}, profile={self.profile})"
            raise BadSpec(what, cure="Leave weighting out: a profile brings its own weights")

    def said_by(self, header: Header) -> Codec:
        return replace(self, step=header.step, profile=name_of(header.profile_hash))

    def unsaid(self) -> Codec:
        return replace(self, step=type(self).step, profile=NONE)

    def agreed(self) -> Codec:
        return self if self._profile is None else replace(self, profile=self._profile.name)

    @property
    def profile_hash(self) -> int:
        return 0 if self._profile is None else self._profile.wire_hash

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        manifest, message = self._measured(kv, plan)

        def build(one: Written) -> Frame:
            n_tokens, step, profile_hash = manifest.n_tokens, one.step, self.profile_hash
            return kv_frame(kv.geometry, n_tokens, one.segments(), step=step, profile_hash=profile_hash)

        if max_bytes is None:
            return build(message.at(self.step))
        return finest(self.step, MAX_STEP, max_bytes, message, build)

    def smallest(self, kv: KV, plan: Plan | None = None) -> int:
        _, message = self._measured(kv, plan)
        return packed_bytes([len(segment.body) for segment in message.at(MAX_STEP).segments()])

    def menu(self, kv: KV, max_bytes: int | None = None) -> Menu:
        """What each class costs and loses; error in steps of class 1, squared.

        Class 1 is the finest step, or, with a cap, four octaves below the one step at which all slots would fit.
        """
        _, message = self._measured(kv, None)
        return menu_of(kv, message, self.step if max_bytes is None else self._middle(kv, max_bytes) - _BELOW)

    def _middle(self, kv: KV, max_bytes: int) -> int:
        try:
            return max(self.encode(kv, None, max_bytes).step, self.step + _BELOW)
        except BudgetTooSmall:
            return MAX_STEP

    def estimate(self, kv: KV) -> Estimate:
        """The ideal bytes of one sequence: numbers, and levels and means apart. Raises what `encode` does."""
        _, message = self._measured(kv, None)
        return ideal(message, self.step)

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        manifest, scheme = self._opened(frame, geometry, limits)
        parts, bodies = parts_of(manifest), frame.bodies(SegmentType.PAYLOAD)
        if [bool(part.blocks) for part in parts] != [bool(body) for body in bodies]:
            raise Malformed(f"{len(bodies)} parts, or an empty one", cure=f"These tokens make {len(parts)}")
        groups = empty_groups(geometry, manifest.n_tokens, bool(manifest.present.all()))
        for part, body in zip(parts, bodies, strict=True):
            if part.blocks:
                read_part(part, body, scheme, frame.step, Writes(groups))
        return manifest.cache(tuple(to_device(group, device) for group in groups), device)

    @torch.no_grad()
    def roundtrip(self, kv: KV) -> KV:
        coded = [self._through(kv.take_batch([row])) for row in range(kv.n_batch)]
        groups = zip(kv.groups, *coded, strict=True)
        return kv.with_groups(tuple(_batch(kv, group.layers, rows) for group, *rows in groups))

    def _through(self, one: KV) -> tuple[Group, ...]:
        """One sequence, coded and decoded in its slots."""
        manifest, message = self._measured(one, None)
        index = np.flatnonzero(one.present[:, 0].any(0).cpu().numpy())
        groups = empty_groups(one.geometry, len(index), bool(manifest.present.all()))
        message.through(self.step, Writes(groups))
        return tuple(spread(group, index, one.n_tokens) for group in groups)

    def _measured(self, kv: KV, plan: Plan | None) -> tuple[Manifest, Message]:
        """What is kept of one sequence, ready to be written at any step."""
        kv.require_space("content")
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep, None if plan is None else plan.classes)
        arrays = Reads(kv, np.flatnonzero(keep.any(0).cpu().numpy()))
        measured = [measure_part(part, arrays) for part in parts_of(manifest)]
        if not all(part.finite for part in measured):
            replace(kv, present=keep.unsqueeze(1)).require_finite()  # names layer, head and token
        scheme = self._profiled(kv.geometry) or self._weighed(measured, kv.geometry)
        return manifest, Message((spec_segment(self), *manifest.segments()), measured, scheme, arrays)

    def _opened(self, frame: Frame, geometry: Geometry, limits: Limits) -> tuple[Manifest, Scheme]:
        """What a frame says of its slots, and what its numbers mean."""
        own = self._profile is None
        uses = Uses(step=True, classes=True, weights=own, profile_hash=self.profile_hash)
        manifest = read_manifest(frame, geometry, limits, uses)
        if manifest.space not in self.spaces:
            raise Malformed(f"{manifest.space} keys under {self.name}", cure="Send content keys")
        scheme = self._profiled(geometry) or self._as_sent(frame.body(SegmentType.WEIGHTS), geometry)
        return manifest, scheme

    def _weighed(self, measured: list[Measured], geometry: Geometry) -> Scheme:
        return SelfContained(weigh(measured, geometry.n_layers, self.weighting), self.weighting)

    def _as_sent(self, body: bytes | None, geometry: Geometry) -> Scheme:
        return SelfContained(read_weights(body, geometry.n_layers, self.weighting), self.weighting)

    def _profiled(self, geometry: Geometry) -> Scheme | None:
        if self._profile is None:
            return None
        self._profile.require_sender(geometry)
        return FromProfile(self._profile, geometry)

    @cached_property
    def _profile(self) -> Profile | None:
        return None if self.profile == NONE else find_profile(self.profile)


def to_device(group: Group, device: torch.device) -> Group:
    """A group of layers elsewhere."""
    return Group(group.layers, group.keys.to(device), group.values.to(device))


def spread(group: Group, index: Int64[np.ndarray, " tokens"], n_tokens: int) -> Group:
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
