"""A cache in a file of safetensors: what `kvferry unpack` writes, other tools read, and `kvferry pack --cache` takes.

Tensors of one sequence, for each group of equal layers `keys.N [layers, heads, tokens, key_dim]` and `values.N`; then
`present [all layers, tokens]`, `positions [axes, tokens]`, and per token `roles`, `parts`, `starts`, `ends`; on the
receiver's token grid also `overlaps`. What else a cache is stands in the metadata: key space, length of the call,
fingerprints of the sender, layers of each group.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvferry.errors import CacheError, ForeignModel, LinkError, ShapeMismatch
from kvferry.files import write_whole
from kvferry.kv import KV, Geometry, Group, Spans

FORMAT = "kvferry cache 1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SPACES = ("content", "rotated")
_COLUMNS = ("parts", "starts", "ends", "roles")
"""Of the spans, one number for each token."""
_OVERLAPS = "overlaps"
"""One more, on the receiver's grid alone."""
_MAX_OVERLAP = 7
_CURE = "Give a file written by kvferry unpack, or one laid out as docs/commands.md says"


def save_cache(kv: KV, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the cache of one sequence, whole or not at all; `notes` go into the metadata.

    Raises `ShapeMismatch` for a batch, `LinkError` where the file cannot be written.
    """
    if kv.n_batch != 1:
        raise ShapeMismatch(f"a batch of {kv.n_batch}, a file holds 1", cure="Save each of kv.sequences()")
    write_whole(Path(path), save(_tensors(kv), {**(notes or {}), **_metadata(kv)}), LinkError)


def load_cache(path: str | Path, geometry: Geometry) -> KV:
    """The cache in a file; `geometry` is that of the model which made it.

    Raises `ForeignModel` for another model's cache, `CacheError` for a file that holds none.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata, geometry)
            names = ["present", "positions", *_COLUMNS, *_group_names(geometry)]
            names += [_OVERLAPS] if _OVERLAPS in file.keys() else []  # noqa: SIM118 it is no dictionary
            tensors = {name: file.get_tensor(name) for name in names}
        return _cache(tensors, metadata, geometry)
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise CacheError(f"{path} holds no cache: {type(error).__name__} {error}", cure=_CURE) from None


def _tensors(kv: KV) -> dict[str, Shaped[Tensor, "..."]]:
    (spans,) = kv.spans
    found = {"present": kv.present[:, 0], "positions": kv.positions[:, 0]}
    for number, group in enumerate(kv.groups):
        found |= {f"keys.{number}": group.keys[:, 0], f"values.{number}": group.values[:, 0]}
    columns = (spans.part, spans.start, spans.end, spans.role)
    found |= {name: torch.from_numpy(column.copy()) for name, column in zip(_COLUMNS, columns, strict=True)}
    if spans.overlap is not None:
        found[_OVERLAPS] = torch.from_numpy(spans.overlap.copy())
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def _group_names(geometry: Geometry) -> list[str]:
    return [f"{what}.{number}" for number in range(len(geometry.groups())) for what in ("keys", "values")]


def _metadata(kv: KV) -> dict[str, str]:
    return {
        "format": FORMAT,
        "keys": kv.space,
        "call_length": str(kv.call_length),
        "model": kv.geometry.model,
        "geometry": kv.geometry.shape_digest(),
        "tokenizer": kv.geometry.tokenizer,
        "layers": json.dumps([group.layers for group in kv.groups]),
    }


def _check_metadata(metadata: Mapping[str, str], geometry: Geometry) -> None:
    if metadata.get("format") != FORMAT or metadata.get("keys") not in _SPACES:
        said = {name: metadata.get(name) for name in ("format", "keys")}
        raise CacheError(f"the metadata say {said}, not format {FORMAT!r} and a key space", cure=_CURE)
    own = {"model": geometry.model, "geometry": geometry.shape_digest(), "tokenizer": geometry.tokenizer}
    for name, wanted in own.items():
        if metadata.get(name) != wanted:
            what = f"the {name} of the cache is {metadata.get(name, 'none')[:16]}, the sender's {wanted[:16]}"
            raise ForeignModel(what, cure="Name the model that made the cache as --sender")


def _cache(
    tensors: Mapping[str, Shaped[Tensor, "..."]], metadata: Mapping[str, str], geometry: Geometry
) -> KV:
    _check_tensors(tensors)
    groups = tuple(
        Group(layers, tensors[f"keys.{number}"].unsqueeze(1), tensors[f"values.{number}"].unsqueeze(1))
        for number, layers in enumerate(geometry.groups())
    )
    return KV(
        geometry=geometry,
        groups=groups,
        present=tensors["present"].bool().unsqueeze(1),
        positions=tensors["positions"].long().unsqueeze(1),
        spans=(_spans(tensors),),
        space="rotated" if metadata["keys"] == "rotated" else "content",
        call_length=int(metadata["call_length"]),
    )


def _spans(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Spans:
    parts, starts, ends = (tensors[name].to(torch.int32).numpy() for name in _COLUMNS[:3])
    overlaps = tensors.get(_OVERLAPS)
    found = None if overlaps is None else overlaps.to(torch.uint8).numpy()
    return Spans(parts, starts, ends, tensors["roles"].to(torch.uint8).numpy(), found)


def _check_tensors(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """Axes and types, which `KV` takes for granted; it checks the sizes itself."""
    for name, tensor in tensors.items():
        axes = 1 if name in (*_COLUMNS, _OVERLAPS) else 2 if name in ("present", "positions") else 4
        if tensor.ndim != axes or (axes == 4) != (tensor.dtype in _FLOATS):
            what = f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ShapeMismatch(what, cure=f"Store {axes} axes; keys and values as one of {_FLOATS}")
        if axes == 1 and len(tensor) != tensors["present"].shape[-1]:
            what = f"{name} of {len(tensor)} for {tensors['present'].shape[-1]} tokens"
            raise ShapeMismatch(what, cure="Store one number for each token")
    for number in tensors[_OVERLAPS].tolist() if _OVERLAPS in tensors else ():
        if not 0 <= number <= _MAX_OVERLAP:
            raise CacheError(f"overlap class {number}", cure=f"Classes are 0 to {_MAX_OVERLAP}")
