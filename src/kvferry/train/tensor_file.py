"""Tensors and facts in one file: safetensors, with JSON in its metadata; written whole or not at all, never unpickled.

A digest of everything stands beside the numbers: a bit that flipped on the disk would otherwise be read as a weight.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8
from xxhash import xxh3_128

from kvferry.errors import FolderError
from kvferry.files import write_whole

Tensors = Mapping[str, Shaped[Tensor, "..."]]


def pack_tensors(kind: str, tensors: Tensors, facts: Mapping[str, Any]) -> bytes:
    """The content of a file of this kind."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(facts, sort_keys=True)
    return save(plain, {"kind": kind, "facts": text, "digest": _digest(plain, text)})


def write_file(path: Path, data: bytes, *, cure: str) -> None:
    """Write beside, then rename. `FolderError` with this cure where that cannot be.

    What lay there before then stays as it was, and nothing is left beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"cannot make {path.parent}: {error.strerror}", cure=cure) from None
    write_whole(path, data, FolderError, cure=cure)


def read_tensors(
    path: Path, kind: str, *, cure: str
) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
    """Tensors on the CPU, mapped from the file rather than copied, and facts. `FolderError` for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        whole = metadata["digest"] == _digest(tensors, metadata["facts"])
        facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FolderError(f"{path} holds no {kind}: {type(error).__name__}: {error}", cure=cure) from None
    if metadata.get("kind") != kind or not whole:
        what = (
            "its content was changed" if metadata.get("kind") == kind else f"it is {metadata.get('kind')!r}"
        )
        raise FolderError(f"{path} holds no {kind}: {what}", cure=cure)
    return tensors, facts


def _digest(tensors: Tensors, facts: str) -> str:
    found = xxh3_128(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(uint8).numpy().data)
    return found.hexdigest()
