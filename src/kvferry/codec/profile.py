"""A profile: what a codec knows of a model beforehand, so that no message has to say it.

A safetensors file with one number a channel (layer by layer, keys before values, head by head): its mean, its deviation
and the weight of its step, both as whole 64ths of an octave, so that all ends compute the same levels; and, for the
encoder alone, how the errors of a head's channels are shaped. It is bound to its model, and a message names it by hash.
Sections are declared in the file; one that is not known is refused: a later codec's `basis`, `block` and `metric_of`
change what the numbers mean.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, Int16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvferry.errors import FolderError, ForeignModel, UsageError
from kvferry.files import write_whole
from kvferry.kv import Geometry

FORMAT = "kvferry.profile/1"
SECTIONS = ("deviation", "mean", "shaping", "weight")
RESERVED = ("basis", "block", "metric_of")
_DTYPES = {"deviation": np.int16, "mean": np.float32, "shaping": np.float16, "weight": np.int16}


@dataclass(frozen=True, eq=False)
class Profile:
    """The numbers of one sender. `fitted` says how they came about; it is no part of the hash."""

    model: str
    geometry: str
    tokenizer: str
    mean: Float32[np.ndarray, " channels"]
    deviation: Int16[np.ndarray, " channels"]
    weight: Int16[np.ndarray, " channels"]
    shaping: Float16[np.ndarray, " entries"]
    """Of every head, row by row, the entries below the diagonal of its unit lower triangular matrix."""
    fitted: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers and of the sender they belong to, 64 hex digits."""
        found = hashlib.sha256(f"{FORMAT} {self.model} {self.geometry} {self.tokenizer}".encode())
        for name in SECTIONS:
            found.update(getattr(self, name).astype(np.dtype(_DTYPES[name]).newbyteorder("<")).tobytes())
        return found.hexdigest()

    @property
    def wire_hash(self) -> int:
        """The 64 bits that travel."""
        return int(self.digest[:16], 16)

    @property
    def name(self) -> str:
        """What it is called in specs and contracts: `p` and 16 digits."""
        return f"p{self.digest[:16]}"

    def require_sender(self, geometry: Geometry) -> None:
        """Raise `ForeignModel` unless the profile was fitted for this model and tokenizer."""
        own = (self.model, self.geometry, self.tokenizer)
        theirs = (geometry.model, geometry.shape_digest(), geometry.tokenizer)
        for what, fitted, given in zip(("model", "geometry", "tokenizer"), own, theirs, strict=True):
            if fitted != given:
                cure = "Fit one for this model: kvferry profile --model ... --out FILE"
                raise ForeignModel(
                    f"the profile was fitted for {what} {fitted[:16]}, this is {given[:16]}", cure=cure
                )
        dims = [(layer.heads, dim) for layer in geometry.layers for dim in (layer.key_dim, layer.value_dim)]
        wanted = sum(heads * dim for heads, dim in dims), sum(h * d * (d - 1) // 2 for h, d in dims)
        if wanted != (len(self.mean), len(self.shaping)):
            what = f"a profile of {len(self.mean)} channels and {len(self.shaping)} entries of shaping"
            raise FolderError(what, cure=f"This model has {wanted}")


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile, beside its place and then there."""
    tensors = {name: getattr(profile, name) for name in SECTIONS}
    said = {name: getattr(profile, name) for name in ("model", "geometry", "tokenizer")}
    metadata = {
        "format": FORMAT,
        "sections": " ".join(SECTIONS),
        "fitted": json.dumps(profile.fitted),
        **said,
    }
    write_whole(path, save(tensors, metadata), UsageError)


def load_profile(path: Path) -> Profile:
    """Read a profile; `FolderError` for a file that is none, or has sections of a later version."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata, sorted(file.keys()))
            tensors = {name: file.get_tensor(name) for name in SECTIONS}
        said = {name: metadata[name] for name in ("model", "geometry", "tokenizer")}
        fitted = _object(metadata["fitted"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        cure = "Make one with kvferry profile"
        raise FolderError(f"cannot read the profile {path}: {error}", cure=cure) from None
    _check_numbers(path, tensors)
    return Profile(**said, **tensors, fitted=fitted)


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{text[:40]!r} is no object")
    return found


def _check_format(path: Path, metadata: dict[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        what = f"{path} is of format {metadata.get('format')!r}, {FORMAT!r} is needed"
        raise FolderError(what, cure="Make one with kvferry profile")
    declared = metadata.get("sections", "").split()
    foreign = sorted({*declared, *names} - {*SECTIONS})
    if foreign:
        later = [name for name in foreign if name in RESERVED]
        cure = "Use a newer kvferry" if later else f"Known sections are {', '.join(SECTIONS)}"
        raise FolderError(f"{path} has sections {', '.join(foreign)}", cure=cure)
    if sorted(declared) != list(SECTIONS):
        raise FolderError(f"{path} has only sections {declared}", cure=f"Give {', '.join(SECTIONS)}")


def _check_numbers(path: Path, tensors: dict[str, np.ndarray]) -> None:
    sizes = {tensor.size for name, tensor in tensors.items() if name != "shaping"}
    fit = len(sizes) == 1 and all(tensor.ndim == 1 for tensor in tensors.values())
    fit &= all(tensors[name].dtype == dtype for name, dtype in _DTYPES.items())
    if not fit or not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise FolderError(f"the numbers of {path} do not fit together", cure="Make one with kvferry profile")
