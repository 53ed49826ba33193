"""The manifest: what a KV message says beside its numbers, checked against the sender that the receiver knows.

Nothing of a size that the message names is allocated before the geometry, which the receiver holds itself, has
confirmed the number of layers and channels, and the limits the number of tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from kvferry.codec import segments as seg
from kvferry.codec.classes import MAX_CLASS, read_classes, write_classes
from kvferry.codec.extent import read_shape, read_tokens, write_shape, write_tokens
from kvferry.errors import ForeignModel, ForeignProfile, LimitExceeded, Malformed, ShapeMismatch, UsageError
from kvferry.kv import KV, Geometry, Group, KeySpace, Spans
from kvferry.wire import Agreement, Frame, FrameType, Limits, MessageKind, Segment, SegmentType, TokenGrid

_MAX_POSITION = 1 << 31
_SPARE_BYTES, _BYTES_PER_TOKEN, _BYTES_PER_SLOT = 1 << 16, 32, 4
"""A segment of the manifest is at most this long: 65,536 bytes, 32 for each token and 4 for it in each layer."""


@dataclass(frozen=True)
class Uses:
    """What a codec writes beside the numbers themselves; a frame that has anything else is refused.

    >>> Uses(step=True, classes=True).profile_hash
    0
    """

    step: bool = False
    """The step in the header means something; otherwise it is 0."""
    classes: bool = False
    """Tokens of different precision classes are coded differently: segment CLASSES."""
    weights: bool = False
    """Segment WEIGHTS, whose body is the codec's own."""
    profile_hash: int = 0
    """The one profile that the codec holds; 0 for none."""


PLAIN = Uses()


@dataclass(frozen=True, eq=False)
class Manifest:
    """One sequence: which layer holds which token, where each token stood and what it was there for."""

    geometry: Geometry
    space: KeySpace
    call_length: int
    present: Bool[np.ndarray, "layers tokens"]
    positions: Int[np.ndarray, "axes tokens"]
    spans: Spans
    classes: UInt8[np.ndarray, "layers 2 tokens"] | None = None
    """1 to 15 where a layer holds a token, 0 elsewhere; None for codecs that treat all alike."""

    @property
    def n_tokens(self) -> int:
        return self.present.shape[1]

    @property
    def counts(self) -> list[int]:
        """Tokens that each layer holds."""
        return self.present.sum(axis=1).tolist()

    def segments(self) -> tuple[Segment, ...]:
        """Everything but spans, which are not sent unless asked for."""
        bodies = {
            SegmentType.SHAPE: write_shape(seg.shape_runs(self.geometry), self.space, self.call_length),
            SegmentType.TOKENS: write_tokens(self.present),
            SegmentType.POSITIONS: seg.write_positions(self.positions),
            SegmentType.ROLES: seg.write_roles(self.spans.role),
            SegmentType.CLASSES: None if self.classes is None else write_classes(self.classes),
            SegmentType.OVERLAPS: seg.write_overlaps(self.spans.overlap),
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


def manifest_of(
    kv: KV,
    keep: Bool[Tensor, "layers tokens"],
    classes: UInt8[Tensor, "layers 2 tokens"] | None = None,
) -> Manifest:
    """The manifest of the slots `keep` of a single sequence; tokens that no layer keeps do not exist in it.

    `classes` are those of the plan, for codecs that use them: 1 to 15 in every slot that is kept (`UsageError`
    otherwise); others pass None and write none.
    """
    kept = keep.cpu().numpy()
    index = np.flatnonzero(kept.any(axis=0))
    positions = kv.positions[:, 0].cpu().numpy().astype(np.int64)[:, index]
    furthest = int(np.abs(positions).max(initial=0))
    if furthest >= _MAX_POSITION or not 0 <= kv.call_length < _MAX_POSITION:
        what = f"a position of {furthest} or a call of {kv.call_length} tokens"
        raise ShapeMismatch(what, cure=f"Positions and lengths stay below {_MAX_POSITION}")
    return Manifest(
        geometry=kv.geometry,
        space=kv.space,
        call_length=kv.call_length,
        present=kept[:, index],
        positions=positions,
        spans=kv.spans[0].take(index),
        classes=None if classes is None else _kept_classes(classes.cpu().numpy(), kept)[..., index],
    )


def _kept_classes(
    classes: UInt8[np.ndarray, "layers 2 tokens"], kept: Bool[np.ndarray, "layers tokens"]
) -> UInt8[np.ndarray, "layers 2 tokens"]:
    wrong = ((classes < 1) | (classes > MAX_CLASS)) & kept[:, None]
    if wrong.any():
        layer, part, token = np.argwhere(wrong)[0]
        what = f"layer {layer}, {('key', 'value')[part]} of token {token} is in class {classes[layer, part, token]}"
        raise UsageError(what, cure=f"Kept tokens have classes 1 to {MAX_CLASS}")
    return np.where(kept[:, None], classes, np.uint8(0))


def spans_segment(spans: Spans) -> Segment:
    """Where each token of a message comes from, for receivers on their own token grid. Ancillary."""
    return Segment(SegmentType.SPANS, seg.write_spans(spans), critical=False)


def kv_frame(
    geometry: Geometry,
    n_tokens: int,
    segments: tuple[Segment, ...],
    *,
    step: int = 0,
    profile_hash: int = 0,
) -> Frame:
    """A KV frame with the hashes of its sender. `step` is i of 2**(i/64), `profile_hash` that of the profile used."""
    agreed = agreement_of(geometry, profile_hash)
    return Frame(
        MessageKind.KV,
        step=step,
        n_tokens=n_tokens,
        model_hash=agreed.model_hash,
        geometry_hash=agreed.geometry_hash,
        tokenizer_hash=agreed.tokenizer_hash,
        profile_hash=profile_hash,
        grid=_grid(segments),
        segments=segments,
    )


def _grid(segments: tuple[Segment, ...]) -> TokenGrid:
    """A cache that says how its tokens overlap the sender's own stands on the receiver's."""
    on_receivers = any(segment.type == SegmentType.OVERLAPS for segment in segments)
    return TokenGrid.RECEIVER if on_receivers else TokenGrid.SENDER


def agreement_of(geometry: Geometry, profile_hash: int = 0) -> Agreement:
    """What the headers of a sender's messages say in hashes, for short headers: one for each profile it may use."""
    model, shape, tokenizer = _hashes(geometry)
    return Agreement(model, shape, tokenizer, profile_hash)


def read_manifest(frame: Frame, geometry: Geometry, limits: Limits, uses: Uses = PLAIN) -> Manifest:
    """What a frame says of a cache of `geometry`, for a codec that `uses` these.

    `classes` are 1 where the frame has none, and None if the codec does not use them. Raises `ForeignModel`,
    `ForeignProfile`, `Malformed` or `LimitExceeded`.
    """
    check_sender(frame, geometry, uses)
    _check_sizes(frame, geometry, limits)
    space, call_length = _checked_shape(frame, geometry)
    n = frame.n_tokens
    present = read_tokens(frame.body(SegmentType.TOKENS), geometry.n_layers, n)
    positions = seg.read_positions(frame.body(SegmentType.POSITIONS), n)
    if np.abs(positions).max(initial=0) >= _MAX_POSITION:
        raise Malformed(f"a position beyond {_MAX_POSITION}", cure="Positions count tokens")
    roles = seg.read_roles(frame.body(SegmentType.ROLES), n)
    overlap = seg.read_overlaps(frame.body(SegmentType.OVERLAPS), n)
    spans = seg.read_spans(frame.body(SegmentType.SPANS), roles, overlap)
    classes = read_classes(frame.body(SegmentType.CLASSES), present) if uses.classes else None
    manifest = Manifest(geometry, space, call_length, present, positions, spans, classes)
    _check_canonical(frame, manifest, uses)
    return manifest


def check_sender(frame: Frame, geometry: Geometry, uses: Uses = PLAIN) -> None:
    """Raise `ForeignModel` unless the frame comes from this model, geometry and tokenizer.

    Raises `Malformed` if it is no KV frame that stands alone, `ForeignProfile` if it was coded with another profile.
    """
    if frame.kind != MessageKind.KV or frame.frame_type != FrameType.I or (frame.step and not uses.step):
        what = f"kind {frame.kind.name}, type {frame.frame_type.name}, step {frame.step}"
        cure = f"This codec reads KV frames of type I{'' if uses.step else ' without a step'}"
        raise Malformed(what, cure=cure)
    came = (frame.model_hash, frame.geometry_hash, frame.tokenizer_hash)
    for what, got, want in zip(("model", "geometry", "tokenizer"), came, _hashes(geometry), strict=True):
        if got != want:
            cure = "Use the aligner that was fitted for this sender"
            raise ForeignModel(
                f"the message's {what} is {got:016x}, this receiver knows {want:016x}", cure=cure
            )
    if frame.profile_hash != uses.profile_hash:
        what = f"the message was coded with {_profile(frame.profile_hash)}"
        cure = "Give both sides the same profile, or code without one"
        raise ForeignProfile(f"{what}, this codec holds {_profile(uses.profile_hash)}", cure=cure)


def _profile(profile_hash: int) -> str:
    return f"profile {profile_hash:016x}" if profile_hash else "no profile"


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
    longest = _SPARE_BYTES + frame.n_tokens * (_BYTES_PER_TOKEN + _BYTES_PER_SLOT * geometry.n_layers)
    for segment in frame.segments:
        if segment.type < SegmentType.PAYLOAD and len(segment.body) > longest:
            what = f"segment {SegmentType(segment.type).name} has {len(segment.body)} bytes"
            raise LimitExceeded(f"{what}, the limit is {longest}", cure="Describe fewer tokens")


def _checked_shape(frame: Frame, geometry: Geometry) -> tuple[KeySpace, int]:
    body = frame.body(SegmentType.SHAPE)
    if body is None:
        raise Malformed("a KV frame without SHAPE", cure="Send a segment SHAPE")
    runs, space, call_length = read_shape(body)
    if runs != seg.shape_runs(geometry):
        what = f"SHAPE says {runs}, the sender's geometry {seg.shape_runs(geometry)}"
        raise Malformed(what, cure="Runs are (layers, heads, key_dim, value_dim)")
    return space, call_length


def _check_canonical(frame: Frame, manifest: Manifest, uses: Uses) -> None:
    if frame.grid != _grid(frame.segments):
        what = f"the header says the {frame.grid.name.lower()} grid, the segments do not"
        raise Malformed(what, cure="Write OVERLAPS on the receiver's grid, and only there")
    again = manifest.segments()
    elsewhere = {SegmentType.SPEC, SegmentType.PAYLOAD, *([SegmentType.WEIGHTS] if uses.weights else [])}
    if frame.body(SegmentType.SPANS) is not None:
        again = (*again, spans_segment(manifest.spans))
    came = tuple(s for s in frame.segments if s.type not in elsewhere)
    if came != again:
        names = [SegmentType(segment.type).name for segment in came]
        raise Malformed(f"segments {names} are not written canonically", cure="Write them with kvferry.codec")
