"""Codecs of fixed rate: the size follows from shape and number of tokens alone, unless a second stage shortens it.

Each layer is one PAYLOAD segment, the block of its keys and then that of its values. So a cut message keeps whole
layers, and coding needs memory for one layer at a time.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from kvferry.codec.base import Codec, kept, spec_segment
from kvferry.codec.centre import channel_means
from kvferry.codec.finite import all_finite
from kvferry.codec.fresh import fresh
from kvferry.codec.manifest import Manifest, kv_frame, manifest_of, read_manifest
from kvferry.codec.second_stage import check_level, squeezed, unsqueezed
from kvferry.errors import BudgetTooSmall, Malformed, NotFinite
from kvferry.kv import KV, Geometry, Group, LayerGeometry, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes

_MEAN_BYTES = 2
_AT_ONCE, _AT_ONCE_ON_DEVICES = 1 << 20, 1 << 22
"""Numbers taken at once: few calls, and yet memory for few layers, which stays in the cache of a processor."""


@dataclass(frozen=True, repr=False)
class FixedRate(Codec):
    """A codec whose members only say what happens to one block: keys or values of one layer, `[heads, tokens, dim]`."""

    zstd: int = field(default=0, kw_only=True)
    """The level of the second stage, 0 for none."""

    def __post_init__(self) -> None:
        check_level(self.zstd)

    @property
    def subtracts_means(self) -> bool:
        """Whether the mean of each channel of the keys is subtracted, and sent in front of their block."""
        return False

    @abstractmethod
    def block_bytes(self, heads: int, tokens: int, dim: int) -> int:
        """Exact length of a block."""

    @abstractmethod
    def write(self, block: Float[Tensor, "heads tokens dim"]) -> UInt8[Tensor, " bytes"]:
        """The bytes of a block of finite numbers, one at least, on the device of the block."""

    @abstractmethod
    def read(
        self, data: UInt8[Tensor, " bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "heads tokens dim"]:
        """The inverse, float32; `Malformed` for bytes that `write` cannot give."""

    @abstractmethod
    def through(
        self,
        values: Float[Tensor, "layers batch heads tokens dim"],
        present: Bool[Tensor, "layers batch tokens"],
    ) -> Float[Tensor, "layers batch heads tokens dim"]:
        """`read(write(...))` of the present tokens of each layer and sequence. Absent slots do not matter."""

    def write_layers(self, values: Float[Tensor, "layers heads tokens dim"]) -> UInt8[Tensor, "layers bytes"]:
        """The blocks of several layers; `NotFinite` if one holds NaN or infinity."""
        if not all_finite(values):
            raise NotFinite("a number is NaN or infinite", cure="Check the model's dtype: fp16 overflows")
        return torch.stack([self.write(block) for block in values])

    def read_layers(
        self, data: UInt8[Tensor, "layers bytes"], out: Float[Tensor, "layers heads tokens dim"]
    ) -> None:
        """The inverse of `write_layers`, into `out`."""
        heads, tokens, dim = out.shape[1:]
        for block, row in zip(out, data, strict=True):
            block.copy_(self.read(row, (heads, tokens, dim)))

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep)
        head = (spec_segment(self), *manifest.segments())
        if not self.zstd:
            check_cap(head, self._layer_bytes(manifest), max_bytes)
        bodies = self._bodies(kv, keep)
        if self.zstd:
            check_cap(head, [len(body) for body in bodies], max_bytes)
        payload = [Segment(SegmentType.PAYLOAD, body) for body in bodies]
        return kv_frame(kv.geometry, manifest.n_tokens, (*head, *payload))

    def smallest(self, kv: KV, plan: Plan | None = None) -> int:
        if self.zstd:
            return packed_bytes([len(segment.body) for segment in self.encode(kv, plan).segments])
        manifest = manifest_of(kv, kept(kv, plan))
        head = [len(segment.body) for segment in (spec_segment(self), *manifest.segments())]
        return packed_bytes(head + self._layer_bytes(manifest))

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        manifest = read_manifest(frame, geometry, limits)
        bodies, lengths = frame.bodies(SegmentType.PAYLOAD), self._layer_bytes(manifest)
        if self.zstd and len(bodies) == len(lengths):
            bodies = [unsqueezed(body, length) for body, length in zip(bodies, lengths, strict=True)]
        came = [len(body) for body in bodies]
        if came != lengths:
            raise Malformed(f"PAYLOAD segments of {came} bytes", cure=f"{self!r} needs {lengths}")
        groups = (self._read_group(layers, bodies, manifest, device) for layers in geometry.groups())
        return manifest.cache(tuple(groups), device)

    @torch.no_grad()
    def roundtrip(self, kv: KV) -> KV:
        return kv.with_groups(
            tuple(self._through_group(group, kv.present[list(group.layers)]) for group in kv.groups)
        )

    def _layer_bytes(self, manifest: Manifest) -> list[int]:
        counts = manifest.counts
        sizes: dict[int, int] = {}
        for layers in manifest.geometry.groups():
            shape = manifest.geometry.layers[layers[0]]
            of = {n: sum(self._part_bytes(shape, n)) for n in {counts[layer] for layer in layers}}
            sizes.update({layer: of[counts[layer]] for layer in layers})
        return [sizes[layer] for layer in range(len(counts))]

    def _part_bytes(self, layer: LayerGeometry, n_tokens: int) -> tuple[int, int]:
        """Bytes of the keys and of the values of one layer."""
        means = _MEAN_BYTES * layer.heads * layer.key_dim if self.subtracts_means and n_tokens else 0
        keys = means + self.block_bytes(layer.heads, n_tokens, layer.key_dim)
        return keys, self.block_bytes(layer.heads, n_tokens, layer.value_dim)

    def _bodies(self, kv: KV, keep: Bool[Tensor, "layers tokens"]) -> list[bytes]:
        """The plain or squeezed body of each layer; `NotFinite` names layer, head and token."""
        bodies: dict[int, bytes] = {}
        try:
            with torch.no_grad():
                for group in kv.groups:
                    bodies.update(zip(group.layers, self._write_group(group, keep), strict=True))
        except NotFinite:
            replace(kv, present=keep.unsqueeze(1)).require_finite()
            raise
        ordered = [bodies[layer] for layer in range(kv.geometry.n_layers)]
        return [squeezed(body, self.zstd) for body in ordered] if self.zstd else ordered

    def _write_group(self, group: Group, keep: Bool[Tensor, "all_layers tokens"]) -> Iterator[bytes]:
        here = keep[list(group.layers)]
        for rows in _runs(group.keys[:, 0], whole=bool(here.all())):
            index = here[rows][0].nonzero().flatten()
            keys, values = (x[rows, 0] for x in (group.keys, group.values))
            if len(index) < keys.shape[2]:
                keys, values = keys[:, :, index], values[:, :, index]
            blocks = self._write_part(keys, self.subtracts_means), self._write_part(values, False)
            yield from (b"".join((key.data, value.data)) for key, value in zip(*blocks, strict=True))

    def _write_part(
        self, values: Float[Tensor, "layers heads tokens dim"], centred: bool
    ) -> UInt8[np.ndarray, "layers bytes"]:
        if not values.numel():
            return np.empty((len(values), 0), np.uint8)
        if not centred:
            return self.write_layers(values).cpu().numpy()
        keys = values.float()
        means = channel_means(keys, torch.tensor([[keys.shape[2]]], device=keys.device))
        body = self.write_layers(keys - means.float().unsqueeze(2))
        return torch.cat([means.flatten(1).view(torch.uint8), body], 1).cpu().numpy()

    def _read_group(
        self, layers: tuple[int, ...], bodies: list[bytes], manifest: Manifest, device: torch.device
    ) -> Group:
        present = manifest.present[list(layers)]
        shape, whole = manifest.geometry.layers[layers[0]], bool(present.all())
        slots = (len(layers), 1, shape.heads, manifest.n_tokens)
        keys, values = (fresh((*slots, dim), whole, device) for dim in (shape.key_dim, shape.value_dim))
        for rows in _runs(keys[:, 0], whole):
            index = torch.from_numpy(np.flatnonzero(present[rows][0])).to(device)
            mine = [bodies[layer] for layer in layers[rows]]
            cut, _ = self._part_bytes(shape, len(index))
            for part, out, centred in (
                (slice(cut), keys, self.subtracts_means),
                (slice(cut, None), values, False),
            ):
                data = np.stack([np.frombuffer(memoryview(body)[part], np.uint8) for body in mine])
                into = out[rows, 0] if whole else out.new_empty(1, shape.heads, len(index), out.shape[4])
                self._read_part(torch.from_numpy(data).to(device), into, centred)
                if not whole:
                    out[rows, 0][:, :, index] = into
        return Group(layers, keys, values)

    def _read_part(
        self,
        data: UInt8[Tensor, "layers bytes"],
        out: Float[Tensor, "layers heads tokens dim"],
        centred: bool,
    ) -> None:
        if not out.numel():
            return
        cut = _MEAN_BYTES * out.shape[1] * out.shape[3] if centred else 0
        self.read_layers(data[:, cut:].contiguous(), out)
        if centred:
            means = data.new_empty(len(data), cut).copy_(data[:, :cut]).view(torch.float16)
            if not all_finite(means):
                raise Malformed("a mean is NaN or infinite", cure="Send finite means")
            out.add_(means.float().reshape(len(data), out.shape[1], 1, out.shape[3]))

    def _through_group(self, group: Group, present: Bool[Tensor, "layers batch tokens"]) -> Group:
        slots = present[:, :, None, :, None]
        keys, values = (torch.where(slots, x.detach().float(), 0.0) for x in (group.keys, group.values))
        means = 0.0
        if self.subtracts_means:
            means = channel_means(keys, present.sum(-1, keepdim=True)).float().unsqueeze(3)
            keys = torch.where(slots, keys - means, 0.0)
        keys, values = self.through(keys, present) + means, self.through(values, present)
        return Group(group.layers, torch.where(slots, keys, 0.0), torch.where(slots, values, 0.0))


def _runs(layers: Shaped[Tensor, "layers heads tokens dim"], whole: bool) -> Iterator[slice]:
    """Layers to take at once: if all are `whole`, as many as fit; otherwise one, for each holds tokens of its own."""
    limit = _AT_ONCE if layers.device.type == "cpu" else _AT_ONCE_ON_DEVICES
    step = max(1, limit // max(1, layers[0].numel())) if whole else 1
    return (slice(start, start + step) for start in range(0, len(layers), step))


def check_cap(head: tuple[Segment, ...], payload: list[int], max_bytes: int | None) -> None:
    size = packed_bytes([len(segment.body) for segment in head] + payload)
    if max_bytes is not None and size > max_bytes:
        raise BudgetTooSmall(max_bytes, size)
