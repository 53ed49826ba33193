"""What the receiver would see of the slots: the ground of scores that look through the aligner.

A score of this kind is one number for each slot, the same in all layers of the sender: there is no telling which of its
layers a map puts into which of the receiver's. Each layer of the receiver, and its keys and values, weigh alike.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.kv import KV
from kvferry.select.sight import Sight


def as_seen(sight: Sight) -> KV:
    """The slots through `Sight.readout`; `UsageError` where there is none, `ShapeMismatch` for other slots."""
    if sight.readout is None:
        cure = "Hand in an aligner as the readout, or choose a selector that looks at the sender's own cache"
        raise UsageError("this selector looks through the aligner, and there is none", cure=cure)
    with torch.no_grad():
        seen = sight.readout(sight.kv)
    if (seen.n_batch, seen.n_tokens) != (1, sight.kv.n_tokens):
        cure = f"Give a readout that keeps each of the {sight.kv.n_tokens} slots in its place"
        raise ShapeMismatch(f"the readout has {seen.n_tokens} slots", cure=cure)
    return seen


def of_sender(
    sight: Sight, seen: KV, sizes: Callable[[int], list[Float[Tensor, " slots"]]]
) -> Float[Tensor, "layers slots"]:
    """Sizes of the parts of each slot, by layer of the receiver, as one score; -inf for a slot that gets lost."""
    parts = [
        of_mean_one(size, seen.present[layer, 0])
        for layer in range(seen.geometry.n_layers)
        for size in sizes(layer)
    ]
    score = torch.stack(parts).mean(0).masked_fill(~seen.present.any(0)[0], -torch.inf)
    return score.expand(sight.kv.geometry.n_layers, -1)


def of_mean_one(size: Float[Tensor, " slots"], held: Bool[Tensor, " slots"]) -> Float[Tensor, " slots"]:
    """Scaled so that the mean over the slots held is 1; zero elsewhere."""
    kept = size.masked_fill(~held, 0.0)
    mean = kept.sum() / held.sum().clamp(min=1)
    return kept / mean.clamp(min=torch.finfo(kept.dtype).tiny)


def distance(
    part: Float[Tensor, "heads slots dim"], base: Float[Tensor, "heads #slots dim"]
) -> Float[Tensor, " slots"]:
    """How far the keys, or the values, of each slot lie from those of `base`, all heads together."""
    return (part.float() - base.float()).square().sum((0, 2)).sqrt()
