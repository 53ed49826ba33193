"""Codecs of fixed rate: the size follows from shape and number of tokens alone, unless a second stage shortens it.

Each layer is one PAYLOAD segment, the block of its keys and then that of its values. So a cut message keeps whole
layers, and coding needs memory for one layer at a time.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kvferry.codec.base import Codec, kept, spec_segment
from kvferry.codec.centre import channel_means
from kvferry.codec.manifest import Manifest, kv_frame, manifest_of, read_manifest
from kvferry.codec.second_stage import check_level, squeezed, unsqueezed
from kvferry.errors import BudgetTooSmall, Malformed, NotFinite
from kvferry.kv import KV, Geometry, Group, LayerGeometry, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes

_MEAN_BYTES = 2
_READY = (torch.float32, torch.bfloat16)
"""Types that are coded as they are; others become float32, one layer at a time."""


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
        if not bool(values.isfinite().all()):
            raise NotFinite("a number is NaN or infinite", cure="Check the model's dtype: fp16 overflows")
        empty = values.new_empty(len(values), 0, dtype=torch.uint8)
        return torch.stack([self.write(block) for block in values]) if values.numel() else empty

    def read_layers(
        self, data: UInt8[Tensor, "layers bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "layers heads tokens dim"]:
        """The inverse of `write_layers`."""
        values = torch.empty(len(data), *shape, device=data.device)
        for block, row in zip(values, data, strict=True):
            if block.numel():
                block.copy_(self.read(row, shape))
        return values

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep)
        head = (spec_segment(self), *manifest.segments())
        if not self.zstd:
            _check_cap(head, self._layer_bytes(manifest), max_bytes)
        bodies = self._bodies(kv, keep)
        _check_cap(head, [len(body) for body in bodies], max_bytes)
        payload = [Segment(SegmentType.PAYLOAD, body) for body in bodies]
        return kv_frame(kv.geometry, manifest.n_tokens, (*head, *payload))

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
        layers = zip(manifest.geometry.layers, manifest.counts, strict=True)
        return [sum(self._part_bytes(layer, n)) for layer, n in layers]

    def _part_bytes(self, layer: LayerGeometry, n_tokens: int) -> tuple[int, int]:
        """Bytes of the keys and of the values of one layer."""
        means = _MEAN_BYTES * layer.heads * layer.key_dim if self.subtracts_means and n_tokens else 0
        keys = means + self.block_bytes(layer.heads, n_tokens, layer.key_dim)
        return keys, self.block_bytes(layer.heads, n_tokens, layer.value_dim)

    def _bodies(self, kv: KV, keep: Bool[Tensor, "layers tokens"]) -> list[bytes]:
        """The plain or squeezed body of each layer; `NotFinite` names layer, head and token."""
        bodies: dict[int, bytes] = {}
        try:
            for group in kv.groups:
                bodies.update(zip(group.layers, self._write_group(group, keep), strict=True))
        except NotFinite:
            replace(kv, present=keep.unsqueeze(1)).require_finite()
            raise
        ordered = [bodies[layer] for layer in range(kv.geometry.n_layers)]
        return [squeezed(body, self.zstd) for body in ordered] if self.zstd else ordered

    @torch.no_grad()
    def _write_group(self, group: Group, keep: Bool[Tensor, "all_layers tokens"]) -> Iterator[bytes]:
        here = keep[list(group.layers)]
        whole = bool(here.all())
        for rows in [slice(None)] if whole else [slice(row, row + 1) for row in range(len(here))]:
            index = slice(None) if whole else here[rows][0].nonzero().flatten()
            keys = self._write_part(group.keys[rows, 0][:, :, index], self.subtracts_means)
            values = self._write_part(group.values[rows, 0][:, :, index], False)
            yield from (b"".join((k.data, v.data)) for k, v in zip(keys, values, strict=True))

    def _write_part(
        self, values: Float[Tensor, "layers heads tokens dim"], centred: bool
    ) -> UInt8[np.ndarray, "layers bytes"]:
        if values.dtype in _READY and not centred:
            return self.write_layers(values).cpu().numpy()
        one = self._write_centred if centred and values.shape[2] else self.write_layers
        return torch.cat([one(layer.float()) for layer in values.split(1)]).cpu().numpy()

    def _write_centred(self, keys: Float[Tensor, "1 heads tokens dim"]) -> UInt8[Tensor, "1 bytes"]:
        means = channel_means(keys, torch.tensor([[keys.shape[2]]], device=keys.device))
        body = self.write_layers(keys - means.float().unsqueeze(2))
        return torch.cat([means.flatten(1).view(torch.uint8), body], 1)

    def _read_group(
        self, layers: tuple[int, ...], bodies: list[bytes], manifest: Manifest, device: torch.device
    ) -> Group:
        present = manifest.present[list(layers)]
        shape = manifest.geometry.layers[layers[0]]
        mine = [bodies[layer] for layer in layers]
        if present.all():
            keys, values = self._read_layers(mine, shape, manifest.n_tokens, device)
            return Group(layers, keys.unsqueeze(1), values.unsqueeze(1))
        slots = torch.zeros(len(layers), 1, shape.heads, manifest.n_tokens, 0, device=device)
        keys = slots.new_zeros(*slots.shape[:-1], shape.key_dim)
        values = slots.new_zeros(*slots.shape[:-1], shape.value_dim)
        for row, body in enumerate(mine):
            index = torch.from_numpy(np.flatnonzero(present[row])).to(device)
            key, value = self._read_layers([body], shape, len(index), device)
            keys[row, 0][:, index], values[row, 0][:, index] = key[0], value[0]
        return Group(layers, keys, values)

    def _read_layers(
        self, bodies: list[bytes], layer: LayerGeometry, n_tokens: int, device: torch.device
    ) -> tuple[Float[Tensor, "layers heads tokens key_dim"], Float[Tensor, "layers heads tokens value_dim"]]:
        """Keys and values of layers of one shape that hold equally many tokens."""
        cut, _ = self._part_bytes(layer, n_tokens)
        halves = (
            np.stack([np.frombuffer(memoryview(body)[part], np.uint8) for body in bodies])
            for part in (slice(cut), slice(cut, None))
        )
        keys, values = (torch.from_numpy(half).to(device) for half in halves)
        key_shape = (layer.heads, n_tokens, layer.key_dim)
        read_keys = self._read_centred if self.subtracts_means and n_tokens else self.read_layers
        return read_keys(keys, key_shape), self.read_layers(values, (*key_shape[:2], layer.value_dim))

    def _read_centred(
        self, data: UInt8[Tensor, "layers bytes"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "layers heads tokens dim"]:
        cut = _MEAN_BYTES * shape[0] * shape[2]
        means = data[:, :cut].flatten().clone().view(torch.float16).reshape(-1, shape[0], 1, shape[2])
        if not bool(means.isfinite().all()):
            raise Malformed("a mean is NaN or infinite", cure="Send finite means")
        return self.read_layers(data[:, cut:].contiguous(), shape).add_(means.float())

    def _through_group(self, group: Group, present: Bool[Tensor, "layers batch tokens"]) -> Group:
        slots = present[:, :, None, :, None]
        keys, values = (torch.where(slots, x.detach().float(), 0.0) for x in (group.keys, group.values))
        means = 0.0
        if self.subtracts_means:
            means = channel_means(keys, present.sum(-1, keepdim=True)).float().unsqueeze(3)
            keys = torch.where(slots, keys - means, 0.0)
        keys, values = self.through(keys, present) + means, self.through(values, present)
        return Group(group.layers, torch.where(slots, keys, 0.0), torch.where(slots, values, 0.0))


def _check_cap(head: tuple[Segment, ...], payload: list[int], max_bytes: int | None) -> None:
    size = packed_bytes([len(segment.body) for segment in head] + payload)
    if max_bytes is not None and size > max_bytes:
        raise BudgetTooSmall(max_bytes, size)
