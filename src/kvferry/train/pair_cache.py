"""What both models read, kept on disk: caches are captured once and read again at every pass over the texts.

One batch of texts is one file of safetensors, under the hash of both models and the texts; no codec has touched it, so
that one file serves them all. The folder stops growing at its limit, and what no longer fits is captured each
time. Throwing the oldest out instead would throw out, pass after pass, just what is needed next.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from kvferry.errors import CacheError, FolderError
from kvferry.kv import Geometry, Need
from kvferry.models.capture import Captured, capture
from kvferry.models.load import Model
from kvferry.train.kv_tensors import evidence_from, evidence_tensors, kv_from, kv_tensors
from kvferry.train.tensor_file import pack_tensors, read_tensors, write_file

_KIND = "kvferry pair 1"
_SIDES = ("sender", "receiver")


@dataclass(frozen=True)
class PairCache:
    """Captures of sender and receiver for batches of texts, at most `max_bytes` of them in the folder.

    `needs` is the evidence that the losses ask of the receiver. What was captured before a training was killed is
    found again by the next one. Several processes may share a folder; each may then go over the limit by one file.
    """

    folder: Path
    sender: Model
    receiver: Model
    max_bytes: int
    needs: tuple[Need, ...] = ()

    def read(self, texts: Sequence[str]) -> tuple[Captured, Captured]:
        """Sender's and receiver's capture of a batch, in content space, on each model's device.

        Raises `FolderError` for a damaged file or one that cannot be written, and what `capture` raises.
        """
        path = self.path(texts)
        if path.exists():
            return self._load(path)
        pair = capture(self.sender, texts), capture(self.receiver, texts, self.needs)
        self._keep(path, pair)
        return pair

    def path(self, texts: Sequence[str]) -> Path:
        """Where the captures of these texts lie, or would lie."""
        identity = [_KIND, _model(self.sender), _model(self.receiver), sorted(self.needs), list(texts)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    @property
    def n_bytes(self) -> int:
        """What lies in the folder."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _keep(self, path: Path, pair: tuple[Captured, Captured]) -> None:
        tensors, room = _tensors(pair), self.max_bytes - self.n_bytes
        if sum(tensor.nbytes for tensor in tensors.values()) > room:  # known without packing
            return
        data = pack_tensors(_KIND, tensors, {"call_lengths": [one.kv.call_length for one in pair]})
        if len(data) <= room:
            write_file(
                path, data, cure=f"Free space there, or give less than {self.max_bytes} bytes as the limit"
            )

    def _load(self, path: Path) -> tuple[Captured, Captured]:
        cure = f"Delete {path.name}; it is then captured again"
        tensors, facts = read_tensors(path, _KIND, cure=cure)
        try:
            sent, held = (
                _captured(_below(side, tensors, model.device), model.geometry, length)
                for side, model, length in zip(
                    _SIDES, (self.sender, self.receiver), facts["call_lengths"], strict=True
                )
            )
        except (CacheError, KeyError, ValueError, TypeError) as error:
            raise FolderError(f"{path} holds other captures: {error}", cure=cure) from None
        return sent, held


def _tensors(pair: tuple[Captured, Captured]) -> dict[str, Shaped[Tensor, "..."]]:
    found = {}
    for side, captured in zip(_SIDES, pair, strict=True):
        rows = kv_tensors(captured.kv) | evidence_tensors(captured.evidence)
        found |= {f"{side}.{name}": tensor for name, tensor in rows.items()}
    return found


def _below(side: str, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Shaped[Tensor, "..."]]:
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{side}.")}
    return {name.removeprefix(f"{side}."): tensor.to(device) for name, tensor in mine.items()}


def _captured(tensors: dict[str, Tensor], geometry: Geometry, call_length: int) -> Captured:
    return Captured(kv_from(tensors, geometry, "content", call_length), evidence_from(tensors))


def _model(model: Model) -> list[Any]:
    """Weights, tokenizer, what stands before the text, and the precision that it is read in."""
    return [model.geometry.model, model.geometry.tokenizer, model.prompt.head, str(model.dtype)]
