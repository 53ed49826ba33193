"""Folders of small modules that were fitted for one sender: `config.json` says which, beside the module's own shape.

`model.safetensors` holds the weights, `README.md` is the card. Every sequence asks for its module, so the last few
stay in memory until their folder changes.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from kvferry.errors import FolderError, ForeignModel
from kvferry.kv import Geometry
from kvferry.weights import find_folder, load_weights, read_config, readable, save_folder

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class BoundFolder(Generic[M]):
    """A kind of folder: its name, how a module is made from a geometry and a config, and the command that fits one."""

    name: str
    build: Callable[[Geometry, Mapping[str, Any]], M]
    command: str

    def save(self, module: M, geometry: Geometry, config: Mapping[str, Any], folder: Path, card: str) -> None:
        """Write the folder whole or not at all; `FolderError` where it cannot be written."""
        bound = {"name": self.name, **_fingerprints(geometry)}
        save_folder(module, folder, {**bound, **config}, card)

    def load(self, where: str | Path, geometry: Geometry, device: torch.device | str = "cpu") -> M:
        """The module of a folder or hub id, for this sender.

        Raises `FolderError` for a folder that is missing, corrupt or of another kind, `ForeignModel` for another
        sender's.
        """
        folder = self._find(where)
        with readable(where, self.name):
            times = tuple((folder / name).stat().st_mtime_ns for name in ("config.json", "model.safetensors"))
            return _load(self, folder, geometry, torch.device(device), times)

    def digest(self, where: str | Path) -> str:
        """SHA-256 of a folder's weights, in hex; `FolderError` where there are none."""
        folder = self._find(where)
        with readable(where, self.name):
            return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def _find(self, where: str | Path) -> Path:
        try:
            return find_folder(where, self.name)
        except FolderError as error:
            cure = f"Fit one with {self.command} --out DIR, or give the hub id of one"
            raise type(error)(error.what, cure=cure) from None

    def require(self, geometry: Geometry, config: Mapping[str, Any]) -> None:
        """Raise `ForeignModel` unless the config names this sender."""
        for what, own in _fingerprints(geometry).items():
            if own != (fitted := str(config[what])):
                said = f"{self.name} was fitted for {what} {fitted[:16]}, this is {own[:16]}"
                raise ForeignModel(said, cure=f"Fit one for this model: {self.command} --out DIR")


def _fingerprints(geometry: Geometry) -> dict[str, str]:
    return {
        "model": geometry.model,
        "geometry": geometry.shape_digest(),
        "tokenizer": geometry.tokenizer,
    }


@lru_cache(maxsize=8)
def _load(
    kind: BoundFolder[M], folder: Path, geometry: Geometry, device: torch.device, times: tuple[int, ...]
) -> M:
    """`times` tell a folder that was fitted anew."""
    config = read_config(folder)
    if config["name"] != kind.name:
        raise ValueError(f"it holds {config['name']!r}")
    kind.require(geometry, config)
    module = kind.build(geometry, config)
    load_weights(module, folder)
    if not all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values()):
        raise FolderError(f"a number of {folder} is NaN or infinite", cure=f"Fit it anew: {kind.command}")
    return module.to(device).eval().requires_grad_(False)
