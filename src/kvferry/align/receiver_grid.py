"""A sender's cache on the receiver's tokens, with the class of how each of them lies to the sender's tokens.

The sender holds the receiver's tokenizer, so the two models' tokens need not correspond one to one. What is pooled from
one token and what is pooled from four differ in kind, and a map may treat them apart: three bits a token say which.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kvferry.align.pooling import pool
from kvferry.align.spans import shared_bytes
from kvferry.errors import GridMismatch
from kvferry.kv import KV, Spans

N_CLASSES = 8
_MOST = 4


def on_receiver_grid(kv: KV, targets: Sequence[Spans], how: str = "weighted") -> KV:
    """`pool` onto the receiver's tokens `targets`, a row for each sequence; spans then say the overlap classes.

    Raises what `pool` raises.
    """
    pooled = pool(kv, targets, how)
    rows = zip(pooled.spans, kv.spans, strict=True)
    spans = tuple(replace(row, overlap=overlap_class(row, source)) for row, source in rows)
    return replace(pooled, spans=spans)


def classes_of(kv: KV) -> Int[Tensor, "batch tokens"]:
    """The overlap classes of a cache on the receiver's grid; `GridMismatch` for one on the sender's."""
    rows = [row.overlap for row in kv.spans]
    if any(row is None for row in rows):
        cure = "Let the sender pool to the receiver's tokens (grid=receiver)"
        raise GridMismatch("the cache stands on the sender's own tokens", cure=cure)
    return torch.from_numpy(np.stack([row for row in rows if row is not None])).long().to(kv.device)


def overlap_class(target: Spans, source: Spans) -> UInt8[np.ndarray, " tokens"]:
    """How many source tokens share bytes with a token, less 1, at most 3; plus 4 where one reaches beyond it."""
    found = shared_bytes(target, source)
    beyond = (source.start[found.columns] < target.start[found.rows]) | (
        source.end[found.columns] > target.end[found.rows]
    )
    n_shared: NDArray[np.int64] = np.bincount(found.rows, minlength=len(target))
    crosses = np.bincount(found.rows, beyond, minlength=len(target)) > 0
    return (np.clip(n_shared, 1, _MOST) - 1 + _MOST * crosses).astype(np.uint8)
