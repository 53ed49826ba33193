"""How near mapped caches come to the receiver's own, on held-out texts: numbers for a card.

R2 says how well the numbers are predicted, the likeness of what the receiver's own queries read says more of answers.
Neither replaces answers: a map trained on them may lower R2 below zero and be better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.align.contract import Aligner
from kvferry.align.features import flatten, unflatten
from kvferry.codec import Codec
from kvferry.kv import KV, Geometry
from kvferry.metrics.likeness import attention_reads, likeness
from kvferry.models.scores import scores_of
from kvferry.train.cases import Asked, Way
from kvferry.train.examples import Example
from kvferry.train.paired import batches, targets
from kvferry.train.route import Route


@dataclass(frozen=True)
class Fidelity:
    """By receiver layer centred R2 of keys and values; over layers and heads, what the receiver's queries read."""

    r2_keys: tuple[float, ...]
    r2_values: tuple[float, ...]
    attention_cosine: float
    attention_error: float


@torch.no_grad()
def fidelity(way: Way, examples: Sequence[Example]) -> Fidelity:
    """Of a map behind its codec, over the examples' contexts and the queries of their continuations."""
    keys, values = _r2(way, examples)
    scores = scores_of(way.receiver)
    found = []
    for case in way.cases(examples):
        wanted, got = (
            attention_reads(asked.kv, asked.queries, asked.positions, scores)
            for asked in (case.own, case.mapped_coded)
        )
        found.append(likeness(got, wanted, _common(case.own, case.mapped_coded)))
    cosine = sum(one.attention_cosine for one in found) / len(found)
    error = sum(one.attention_error for one in found) / len(found)
    return Fidelity(keys, values, cosine, error)


def _common(own: Asked, mapped: Asked) -> Bool[Tensor, "batch new"]:
    return own.mask & mapped.mask


def _r2(way: Way, examples: Sequence[Example]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """1 less the share of each part's variance that is left; means and variances are those of these texts."""
    route = Route(way.sender, way.receiver, way.aligner.contract.grid)
    got, want = [], []
    for batch in batches(examples, 32):
        mapped, entries, paired = _entries(way.aligner, route, way.codec, [one.context for one in batch])
        got.append(flatten(mapped)[paired])
        want.append(entries[paired])
    wanted = torch.cat(want).double()
    left = (torch.cat(got).double() - wanted).square().sum(0)
    spread = (wanted - wanted.mean(0)).square().sum(0)
    return _by_layer(left, spread, way.receiver.geometry)


def _entries(
    aligner: Aligner, route: Route, codec: Codec, contexts: Sequence[str]
) -> tuple[KV, Float[Tensor, "batch tokens out"], Bool[Tensor, "batch tokens"]]:
    sent = route.sent(contexts)
    entries, paired = targets(sent, route.held(contexts))
    return aligner(codec.roundtrip(sent)), entries, paired


def _by_layer(
    left: Float[Tensor, " out"], spread: Float[Tensor, " out"], geometry: Geometry
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    parts: dict[int, tuple[float, float]] = {}
    for lost, all_of in zip(
        unflatten(left[None, None], geometry), unflatten(spread[None, None], geometry), strict=True
    ):
        for row, layer in enumerate(lost.layers):
            shares = [
                1 - float(a[row].sum() / b[row].sum().clamp(min=1e-30))
                for a, b in ((lost.keys, all_of.keys), (lost.values, all_of.values))
            ]
            parts[layer] = (shares[0], shares[1])
    ordered = [parts[layer] for layer in sorted(parts)]
    return tuple(keys for keys, _ in ordered), tuple(values for _, values in ordered)
