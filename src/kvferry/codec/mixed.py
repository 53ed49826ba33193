"""Fixed-rate codecs side by side: the precision class of a token says which of them codes it.

Sizes are known before coding and no number depends on another token's, so what each class costs and loses can be said
exactly for every slot: what selectors that choose precision work on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kvferry.codec.base import Codec, kept, spec_segment
from kvferry.codec.fixed import FixedRate, check_cap
from kvferry.codec.fresh import fresh
from kvferry.codec.integer import Int
from kvferry.codec.manifest import Manifest, Uses, kv_frame, manifest_of, read_manifest
from kvferry.codec.raw import Raw
from kvferry.errors import BadSpec, Malformed, NotFinite, UsageError
from kvferry.kv import KV, Geometry, Group, Menu, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes

_BITS: dict[str, Literal[8, 6, 4, 3, 2]] = {"int8": 8, "int6": 6, "int4": 4, "int3": 3, "int2": 2}
SCHEMES = ("fp16", *_BITS)
"""From fine to coarse."""
_EIGHT = 8


@dataclass(frozen=True)
class _Block:
    """The tokens of one class among the keys (`which` 0) or the values (1) of a layer."""

    layer: int
    which: int
    token_class: int
    tokens: Int64[np.ndarray, " tokens"]


@dataclass(frozen=True, repr=False)
class Mixed(Codec):
    """Class 1 is the first of `schemes`, which are joined by `_` and go from fine to coarse; class 2 the second ...

    `fp16` is `raw(float16)` and refuses what is infinite there, `int8` to `int2` are `int` with this `group`.

    >>> Mixed("int8_int4").scheme(2)
    int(bits=4, group=32, axis=token, centred=False, scale=float16, zstd=0)
    """

    name: ClassVar[str] = "mixed"
    schemes: str = "_".join(SCHEMES)
    group: int = 32

    def __post_init__(self) -> None:
        names = self.schemes.split("_")
        if names != [name for name in SCHEMES if name in names] or self.group < 0:
            what = f"mixed(schemes={self.schemes}, group={self.group})"
            raise BadSpec(
                what, cure=f"Join some of {', '.join(SCHEMES)} by _ in this order; group is 0 or more"
            )

    def scheme(self, token_class: int) -> FixedRate:
        """What codes the tokens of a class; `UsageError` beyond the last."""
        if not 0 < token_class <= len(self._members):
            cure = f"{self.brief()} has classes 1 to {len(self._members)}"
            raise UsageError(f"no scheme for class {token_class}", cure=cure)
        return self._members[token_class - 1]

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        manifest, index = self._described(kv, plan)
        head = (spec_segment(self), *manifest.segments())
        check_cap(head, self._layer_bytes(manifest), max_bytes)
        bodies: list[list[bytes]] = [[] for _ in kv.geometry.layers]
        try:
            for block in _blocks(manifest):
                bodies[block.layer].append(self._write(kv, block, index))
        except NotFinite:
            sent = torch.zeros_like(kv.present)
            sent[:, 0, index] = torch.from_numpy(manifest.present).to(kv.device)
            replace(kv, present=sent).require_finite()  # names layer, head and token
            raise
        payload = [Segment(SegmentType.PAYLOAD, b"".join(body)) for body in bodies]
        return kv_frame(kv.geometry, manifest.n_tokens, (*head, *payload))

    def smallest(self, kv: KV, plan: Plan | None = None) -> int:
        manifest, _ = self._described(kv, plan)
        head = [len(segment.body) for segment in (spec_segment(self), *manifest.segments())]
        return packed_bytes(head + self._layer_bytes(manifest))

    def menu(self, kv: KV, max_bytes: int | None = None) -> Menu:
        """What each class loses, as squared error of really coding every slot in it, and its bits, scales included.

        All classes, whatever the cap. Infinite in `fp16` is an infinite loss.
        """
        kept(kv, None)
        kv.require_finite()
        came = [member.roundtrip(kv) for member in self._members]
        layers = range(kv.geometry.n_layers)
        error = tuple(torch.stack([_lost(kv, one, layer) for one in came]) for layer in layers)
        bits = tuple(torch.stack([_bits(kv, one, layer) for one in self._members]) for layer in layers)
        return Menu(tuple(range(1, len(came) + 1)), error, bits)

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        manifest = read_manifest(frame, geometry, limits, Uses(classes=True))
        highest = int(_classes(manifest).max(initial=0))
        if highest > len(self._members):
            cure = f"{self.brief()} has classes 1 to {len(self._members)}"
            raise Malformed(f"a token in class {highest}", cure=cure)
        bodies, lengths = frame.bodies(SegmentType.PAYLOAD), self._layer_bytes(manifest)
        came = [len(body) for body in bodies]
        if came != lengths:
            raise Malformed(f"PAYLOAD segments of {came} bytes", cure=f"{self!r} needs {lengths}")
        arrays, read = _Arrays(manifest, device), [0] * len(bodies)
        for block in _blocks(manifest):
            start = read[block.layer]
            read[block.layer] += self._block_bytes(geometry, block)
            data = np.frombuffer(bodies[block.layer], np.uint8)[start : read[block.layer]].copy()
            into = arrays.room(block)
            self.scheme(block.token_class).read_layers(torch.from_numpy(data).unsqueeze(0).to(device), into)
            arrays.put(block, into)
        return manifest.cache(arrays.groups, device)

    def roundtrip(self, kv: KV) -> KV:
        return self._members[0].roundtrip(kv)

    @cached_property
    def _members(self) -> tuple[FixedRate, ...]:
        return tuple(
            Raw("float16") if name == "fp16" else Int(_BITS[name], self.group)
            for name in self.schemes.split("_")
        )

    def _described(self, kv: KV, plan: Plan | None) -> tuple[Manifest, Int64[Tensor, " tokens"]]:
        """The manifest of what is kept, and the slots of its tokens."""
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep, (Plan.everything(kv) if plan is None else plan).classes)
        self.scheme(int(_classes(manifest).max(initial=1)))
        return manifest, keep.any(0).nonzero().flatten()

    def _layer_bytes(self, manifest: Manifest) -> list[int]:
        sizes = [0] * manifest.geometry.n_layers
        for block in _blocks(manifest):
            sizes[block.layer] += self._block_bytes(manifest.geometry, block)
        return sizes

    def _block_bytes(self, geometry: Geometry, block: _Block) -> int:
        layer = geometry.layers[block.layer]
        dim = (layer.key_dim, layer.value_dim)[block.which]
        return self.scheme(block.token_class).block_bytes(layer.heads, len(block.tokens), dim)

    def _write(self, kv: KV, block: _Block, index: Int64[Tensor, " tokens"]) -> bytes:
        numbers = kv.layer(block.layer)[block.which]
        slots = index[torch.from_numpy(block.tokens).to(index.device)]
        with torch.no_grad():
            data = self.scheme(block.token_class).write_layers(numbers[:, :, slots])
        return data.cpu().numpy().tobytes()


class _Arrays:
    """The groups of a cache that blocks are put into."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self.groups = tuple(_group(manifest, layers, device) for layers in manifest.geometry.groups())
        self._at = {
            (layer, which): part[row]
            for group in self.groups
            for which, part in enumerate((group.keys, group.values))
            for row, layer in enumerate(group.layers)
        }

    def room(self, block: _Block) -> Float[Tensor, "1 heads tokens dim"]:
        whole = self._at[block.layer, block.which]
        return whole.new_empty(1, whole.shape[1], len(block.tokens), whole.shape[3])

    def put(self, block: _Block, numbers: Float[Tensor, "1 heads tokens dim"]) -> None:
        whole = self._at[block.layer, block.which]
        whole[:, :, torch.from_numpy(block.tokens).to(whole.device)] = numbers


def _group(manifest: Manifest, layers: tuple[int, ...], device: torch.device) -> Group:
    shape, whole = manifest.geometry.layers[layers[0]], bool(manifest.present[list(layers)].all())
    slots = (len(layers), 1, shape.heads, manifest.n_tokens)
    keys, values = (fresh((*slots, dim), whole, device) for dim in (shape.key_dim, shape.value_dim))
    return Group(layers, keys, values)


def _classes(manifest: Manifest) -> np.ndarray:
    if manifest.classes is None:
        raise UsageError("a manifest without classes", cure="Read it with Uses(classes=True)")
    return manifest.classes


def _blocks(manifest: Manifest) -> Iterator[_Block]:
    """In order of the wire: by layer, keys before values, classes ascending."""
    for layer, rows in enumerate(_classes(manifest)):
        for which, row in enumerate(rows):
            for token_class in np.flatnonzero(np.bincount(row))[int(not row.all()) :]:
                yield _Block(layer, which, int(token_class), np.flatnonzero(row == token_class))


def _lost(kv: KV, came: KV, layer: int) -> Float[Tensor, "2 heads tokens"]:
    pairs = zip(kv.layer(layer), came.layer(layer), strict=True)
    errors = torch.stack([(own[0].float() - coded[0]).square().sum(-1) for own, coded in pairs])
    return torch.where(kv.present[layer, 0], errors, 0.0)


def _bits(kv: KV, member: FixedRate, layer: int) -> Float[Tensor, "2 heads tokens"]:
    shape, held = kv.geometry.layers[layer], kv.present[layer, 0].float()
    # Eight slots fill whole bytes, so their bytes are the bits of one.
    bits = [member.block_bytes(1, _EIGHT, dim) for dim in (shape.key_dim, shape.value_dim)]
    return torch.stack([n * held.expand(shape.heads, -1) for n in bits])
