"""The manifest: what a KV message says beside its numbers, checked against the sender that the receiver knows.

Nothing of a size that the message names is allocated before the geometry, which the receiver holds itself, has
confirmed the number of layers and channels, and the limits the number of tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvferry.codec import segments as seg
from kvferry.errors import ForeignModel, LimitExceeded, Malformed, ShapeMismatch, UsageError
from kvferry.kv import KV, Geometry, Group, KeySpace, Spans
from kvferry.wire import Frame, FrameType, Limits, MessageKind, Segment, SegmentType

_MAX_POSITION = 1 << 31
_SPARE_BYTES, _BYTES_PER_TOKEN = 1 << 16, 32
"""A segment of the manifest is at most this long: 65,536 bytes and 32 for each token."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """One sequence: which layer holds which token, where each token stood and what it was there for."""

    geometry: Geometry
    space: KeySpace
    call_length: int
    present: Bool[np.ndarray, "layers tokens"]
    positions: Int[np.ndarray, "axes tokens"]
    spans: Spans

    @property
    def n_tokens(self) -> int:
        return self.present.shape[1]

    @property
    def counts(self) -> list[int]:
        """Tokens that each layer holds."""
        return self.present.sum(axis=1).tolist()

    def segments(self) -> tuple[Segment, ...]:
        """Everything but spans, which are not sent unless asked for: SHAPE, TOKENS, POSITIONS, ROLES."""
        bodies = {
            SegmentType.SHAPE: seg.write_shape(seg.shape_runs(self.geometry), self.space, self.call_length),
            SegmentType.TOKENS: seg.write_tokens(self.present),
            SegmentType.POSITIONS: seg.write_positions(self.positions),
            SegmentType.ROLES: seg.write_roles(self.spans.role),
        }
        return tuple(Segment(kind, body) for kind, body in bodies.items() if body is not None)

    def cache(self, groups: tuple[Group, ...], device: torch.device) -> KV:
        """The cache of these groups."""
        return KV(
            geometry=self.geometry,
            groups=groups,
            present=torch.from_numpy(self.present.copy()).unsqueeze(1).to(device),
            positions=torch.from_numpy(self.positions).unsqueeze(1).to(device),
            spans=(self.spans,),
            space=self.space,
            call_length=self.call_length,
        )


def manifest_of(kv: KV, keep: Bool[Tensor, "layers tokens"]) -> Manifest:
    """The manifest of the slots `keep` of a single sequence; tokens that no layer keeps do not exist in it."""
    kept = keep.cpu().numpy()
    index = np.flatnonzero(kept.any(axis=0))
    positions = kv.positions[:, 0].cpu().numpy().astype(np.int64)[:, index]
    furthest = int(np.abs(positions).max(initial=0))
    if furthest >= _MAX_POSITION or not 0 <= kv.call_length < _MAX_POSITION:
        what = f"a position of {furthest} or a call of {kv.call_length} tokens"
        raise ShapeMismatch(what, cure=f"Positions and lengths stay below {_MAX_POSITION}")
    return Manifest(kv.geometry, kv.space, kv.call_length, kept[:, index], positions, kv.spans[0].take(index))


def spans_segment(spans: Spans) -> Segment:
    """Where each token of a message comes from, for receivers on their own token grid. Ancillary."""
    return Segment(SegmentType.SPANS, seg.write_spans(spans), critical=False)


def kv_frame(geometry: Geometry, n_tokens: int, segments: tuple[Segment, ...]) -> Frame:
    """A KV frame with the hashes of its sender."""
    model, shape, tokenizer = _hashes(geometry)
    return Frame(
        MessageKind.KV,
        n_tokens=n_tokens,
        model_hash=model,
        geometry_hash=shape,
        tokenizer_hash=tokenizer,
        segments=segments,
    )


def read_manifest(frame: Frame, geometry: Geometry, limits: Limits) -> Manifest:
    """What a frame says of a cache of `geometry`; `ForeignModel`, `Malformed` or `LimitExceeded` otherwise."""
    check_sender(frame, geometry)
    _check_sizes(frame, geometry, limits)
    space, call_length = _checked_shape(frame, geometry)
    n = frame.n_tokens
    present = seg.read_tokens(frame.body(SegmentType.TOKENS), geometry.n_layers, n)
    positions = seg.read_positions(frame.body(SegmentType.POSITIONS), n)
    if np.abs(positions).max(initial=0) >= _MAX_POSITION:
        raise Malformed(f"a position beyond {_MAX_POSITION}", cure="Positions count tokens")
    roles = seg.read_roles(frame.body(SegmentType.ROLES), n)
    spans = seg.read_spans(frame.body(SegmentType.SPANS), roles)
    manifest = Manifest(geometry, space, call_length, present, positions, spans)
    _check_canonical(frame, manifest)
    return manifest


def check_sender(frame: Frame, geometry: Geometry) -> None:
    """Raise `ForeignModel` unless the frame comes from this model, geometry and tokenizer.

    Raises `Malformed` if it is no KV frame that stands alone.
    """
    if frame.kind != MessageKind.KV or frame.frame_type != FrameType.I or frame.step or frame.profile_hash:
        what = f"kind {frame.kind.name}, type {frame.frame_type.name}, step {frame.step}, "
        what += f"profile {frame.profile_hash:#x}"
        raise Malformed(what, cure="This codec reads KV frames of type I without step and profile")
    came = (frame.model_hash, frame.geometry_hash, frame.tokenizer_hash)
    for what, got, want in zip(("model", "geometry", "tokenizer"), came, _hashes(geometry), strict=True):
        if got != want:
            cure = "Use the aligner that was fitted for this sender"
            raise ForeignModel(
                f"the message's {what} is {got:016x}, this receiver knows {want:016x}", cure=cure
            )


def wire_hash(digest: str) -> int:
    """The 64 bits of a fingerprint that travel: its first 16 hex digits.

    >>> wire_hash("00000000000000ff" + 48 * "0")
    255
    """
    try:
        return int(digest[:16], 16)
    except ValueError:
        cure = "Fingerprints are 64 hex digits, see kvferry.models"
        raise UsageError(f"{digest[:80]!r} is no fingerprint", cure=cure) from None


@lru_cache(maxsize=64)
def _hashes(geometry: Geometry) -> tuple[int, int, int]:
    digests = (geometry.model, geometry.shape_digest(), geometry.tokenizer)
    model, shape, tokenizer = (wire_hash(digest) for digest in digests)
    return model, shape, tokenizer


def _check_sizes(frame: Frame, geometry: Geometry, limits: Limits) -> None:
    elements = frame.n_tokens * geometry.floats_per_token
    if elements > limits.max_elements or frame.n_tokens > limits.max_tokens:
        what = f"{frame.n_tokens} tokens unfold to {elements} numbers"
        cure = "Send fewer tokens or raise max_elements and max_tokens"
        raise LimitExceeded(
            f"{what}, the limits are {limits.max_tokens} and {limits.max_elements}", cure=cure
        )
    longest = _SPARE_BYTES + _BYTES_PER_TOKEN * frame.n_tokens
    for segment in frame.segments:
        if segment.type < SegmentType.PAYLOAD and len(segment.body) > longest:
            what = f"segment {SegmentType(segment.type).name} has {len(segment.body)} bytes"
            raise LimitExceeded(f"{what}, the limit is {longest}", cure="Describe fewer tokens")


def _checked_shape(frame: Frame, geometry: Geometry) -> tuple[KeySpace, int]:
    body = frame.body(SegmentType.SHAPE)
    if body is None:
        raise Malformed("a KV frame without SHAPE", cure="Send a segment SHAPE")
    runs, space, call_length = seg.read_shape(body)
    if runs != seg.shape_runs(geometry):
        what = f"SHAPE says {runs}, the sender's geometry {seg.shape_runs(geometry)}"
        raise Malformed(what, cure="Runs are (layers, heads, key_dim, value_dim)")
    return space, call_length


def _check_canonical(frame: Frame, manifest: Manifest) -> None:
    again = manifest.segments()
    if frame.body(SegmentType.SPANS) is not None:
        again = (*again, spans_segment(manifest.spans))
    came = tuple(s for s in frame.segments if s.type not in (SegmentType.SPEC, SegmentType.PAYLOAD))
    if came != again:
        names = [SegmentType(segment.type).name for segment in came]
        raise Malformed(f"segments {names} are not written canonically", cure="Write them with kvferry.codec")
