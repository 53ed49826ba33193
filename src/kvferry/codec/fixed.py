"""Codecs of fixed rate: the size follows from shape and number of tokens alone.

Each layer is one PAYLOAD segment, the block of its keys and then that of its values. So a cut message keeps whole
layers, and coding needs memory for one layer at a time.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kvferry.codec.base import Codec, kept, spec_segment
from kvferry.codec.manifest import Manifest, kv_frame, manifest_of, read_manifest
from kvferry.errors import BudgetTooSmall, Malformed
from kvferry.kv import KV, Geometry, Group, Plan
from kvferry.wire import Frame, Limits, Segment, SegmentType, packed_bytes


@dataclass(frozen=True, repr=False)
class FixedRate(Codec):
    """A codec whose members only say what happens to one block: keys or values of one layer, `[heads, tokens, dim]`."""

    @abstractmethod
    def block_bytes(self, heads: int, tokens: int, dim: int) -> int:
        """Exact length of a block."""

    @abstractmethod
    def write(self, block: Float[Tensor, "heads tokens dim"]) -> UInt8[Tensor, " bytes"]:
        """The bytes of a block, on the device of the block."""

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
        """`read(write(...))` of the present tokens of each layer and sequence. Absent slots come as zero."""

    def encode(self, kv: KV, plan: Plan | None = None, max_bytes: int | None = None) -> Frame:
        keep = kept(kv, plan)
        manifest = manifest_of(kv, keep)
        head = (spec_segment(self), *manifest.segments())
        size = packed_bytes([len(segment.body) for segment in head] + self._layer_bytes(manifest))
        if max_bytes is not None and size > max_bytes:
            raise BudgetTooSmall(max_bytes, size)
        bodies = [self._write_layer(kv, keep, layer) for layer in range(kv.geometry.n_layers)]
        payload = [Segment(SegmentType.PAYLOAD, body) for body in bodies]
        return kv_frame(kv.geometry, manifest.n_tokens, (*head, *payload))

    def decode(self, frame: Frame, geometry: Geometry, limits: Limits, device: torch.device) -> KV:
        manifest = read_manifest(frame, geometry, limits)
        bodies = frame.bodies(SegmentType.PAYLOAD)
        came, wanted = [len(body) for body in bodies], self._layer_bytes(manifest)
        if came != wanted:
            raise Malformed(f"PAYLOAD segments of {came} bytes", cure=f"{self!r} needs {wanted}")
        groups = (self._read_group(layers, bodies, manifest, device) for layers in geometry.groups())
        return manifest.cache(tuple(groups), device)

    @torch.no_grad()
    def roundtrip(self, kv: KV) -> KV:
        return kv.with_groups(
            tuple(self._through(group, kv.present[list(group.layers)]) for group in kv.groups)
        )

    def _layer_bytes(self, manifest: Manifest) -> list[int]:
        layers = zip(manifest.geometry.layers, manifest.counts, strict=True)
        return [
            self.block_bytes(layer.heads, n, layer.key_dim)
            + self.block_bytes(layer.heads, n, layer.value_dim)
            for layer, n in layers
        ]

    def _write_layer(self, kv: KV, keep: Bool[Tensor, "layers tokens"], layer: int) -> bytes:
        index = keep[layer].nonzero().flatten()
        blocks = [tensor[0].detach()[:, index] for tensor in kv.layer(layer)]
        if not all(bool(block.isfinite().all()) for block in blocks):
            replace(kv, present=keep.unsqueeze(1)).require_finite()  # names layer, head and token
        return torch.cat([self.write(block) for block in blocks]).cpu().numpy().tobytes()

    def _read_group(
        self, layers: tuple[int, ...], bodies: list[bytes], manifest: Manifest, device: torch.device
    ) -> Group:
        shape = manifest.geometry.layers[layers[0]]
        empty = torch.zeros(len(layers), 1, shape.heads, manifest.n_tokens, 0, device=device)
        keys = empty.new_zeros(*empty.shape[:-1], shape.key_dim)
        values = empty.new_zeros(*empty.shape[:-1], shape.value_dim)
        for row, layer in enumerate(layers):
            data = torch.tensor(np.frombuffer(bodies[layer], np.uint8), device=device)
            index = torch.from_numpy(np.flatnonzero(manifest.present[layer])).to(device)
            cut = self.block_bytes(shape.heads, len(index), shape.key_dim)
            keys[row, 0, :, index] = self.read(data[:cut], (shape.heads, len(index), shape.key_dim))
            values[row, 0, :, index] = self.read(data[cut:], (shape.heads, len(index), shape.value_dim))
        return Group(layers, keys, values)

    def _through(self, group: Group, present: Bool[Tensor, "layers batch tokens"]) -> Group:
        slots = present[:, :, None, :, None]
        keys, values = (torch.where(slots, x.detach().float(), 0.0) for x in (group.keys, group.values))
        return Group(group.layers, self.through(keys, present), self.through(values, present))
