"""A batch of caches as named tensors, and back: what a file of safetensors can hold."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from kvferry.kv import KV, Evidence, Geometry, Group, KeySpace, Spans

_COLUMNS = ("part", "start", "end", "role")
_GRID = "overlap"
"""A column of caches on another model's grid only."""


def kv_tensors(kv: KV) -> dict[str, Shaped[Tensor, "..."]]:
    """`keys.N`, `values.N` of each group, `present`, `positions`, and the columns of the spans `[batch, tokens]`."""
    found = {"present": kv.present, "positions": kv.positions}
    for number, group in enumerate(kv.groups):
        found |= {f"keys.{number}": group.keys, f"values.{number}": group.values}
    for name in (*_COLUMNS, _GRID):
        column = [getattr(spans, name) for spans in kv.spans]
        if all(row is not None for row in column):
            found[name] = torch.from_numpy(np.stack(column))
    return found


def kv_from(
    tensors: Mapping[str, Shaped[Tensor, "..."]], geometry: Geometry, space: KeySpace, call_length: int
) -> KV:
    """The inverse; raises `KeyError` or `CacheError` where the tensors are none of this geometry."""
    groups = tuple(
        Group(layers, tensors[f"keys.{number}"], tensors[f"values.{number}"])
        for number, layers in enumerate(geometry.groups())
    )
    names = (*_COLUMNS, _GRID) if _GRID in tensors else _COLUMNS
    columns = [tensors[name].cpu().numpy() for name in names]
    spans = tuple(Spans(*rows) for rows in zip(*columns, strict=True))
    return KV(geometry, groups, tensors["present"], tensors["positions"], spans, space, call_length)


def evidence_tensors(evidence: Evidence) -> dict[str, Shaped[Tensor, "..."]]:
    """`queries_content.LAYER` and so on, of what was recorded."""
    return {
        f"{name}.{layer}": tensor
        for name, rows in vars(evidence).items()
        for layer, tensor in enumerate(rows)
    }


def evidence_from(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Evidence:
    """The inverse; names of other things are passed over."""

    def rows(name: str) -> tuple[Tensor, ...]:
        n = sum(key.startswith(f"{name}.") for key in tensors)
        return tuple(tensors[f"{name}.{layer}"] for layer in range(n))

    return Evidence(**{name: rows(name) for name in vars(Evidence())})
