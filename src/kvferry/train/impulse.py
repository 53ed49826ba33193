"""What an aligner does to an error of its input, found out by asking it: the answer to an impulse in each feature.

That is all of an affine map, whatever its class. To be taken for one it must then do to other inputs, at other places,
what that answer says. Maps with activations are taken apart in `composed_map`.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Aligner
from kvferry.align.features import flatten, unflatten
from kvferry.align.receiver_grid import N_CLASSES
from kvferry.errors import UncertifiableMap
from kvferry.kv import KV
from kvferry.metrics.lipschitz import require_slope
from kvferry.train.composed_map import COMPOSED
from kvferry.train.token_map import TokenMap, everywhere

REACH = 12
"""Tokens of the probes: a map that looks back further is not certified."""
_IMPULSE = 64.0  # a power of two, large beside biases, so that their difference is exact enough
_TOLERANCE = 1e-3
_ROUNDING = 1e-5
"""Of the largest response: below it a token is held to answer nothing."""
_CHUNK = 64


@torch.no_grad()
def token_map(aligner: Aligner, like: KV) -> TokenMap:
    """The map of an aligner, exact if it is affine. `like` is a cache as it is handed one, for spans and positions.

    Raises `UncertifiableMap` for a map that is neither affine nor known, or that goes by a token's place.
    """
    for module in aligner.modules():
        require_slope(module)
    if aligner.name in COMPOSED:
        return COMPOSED[aligner.name](aligner)
    probes = _probes(like)
    responses = [_impulse_response(aligner, probe) for probe in probes]
    for probe, response in zip(probes, responses, strict=True):
        _check(aligner, probe, response)
    n = max(map(_n_answering, responses))
    beside = [torch.cat(list(response[:n].transpose(1, 2)), -1) for response in responses]
    return TokenMap(n, tuple((everywhere(last),) for last in beside))


def _probes(like: KV) -> list[KV]:
    """The first tokens of the first sequence, all of them present; on the receiver's grid once for each class."""
    short = next(like.sequences())
    short = short.take_tokens(torch.arange(min(REACH, short.n_tokens), device=like.device))
    short = replace(short, present=torch.ones_like(short.present))
    spans = short.spans[0]
    if spans.overlap is None:
        return [short]
    classes = [np.full(len(spans), index, np.uint8) for index in range(N_CLASSES)]
    return [replace(short, spans=(replace(spans, overlap=overlap),)) for overlap in classes]


def _apply(
    aligner: Aligner, like: KV, features: Float[Tensor, "batch tokens f"]
) -> Float[Tensor, "batch tokens out"]:
    many = like.take_batch([0] * len(features))
    return flatten(aligner(many.with_groups(unflatten(features, like.geometry))))


def _impulse_response(aligner: Aligner, like: KV) -> Float[Tensor, "tokens f out"]:
    """What each token gives for each feature of the first one."""
    n_features = like.geometry.floats_per_token
    still = torch.zeros(1, like.n_tokens, n_features, device=like.device)
    base, parts = _apply(aligner, like, still), []
    for start in range(0, n_features, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, n_features))
        struck = still.repeat(len(rows), 1, 1)
        struck[torch.arange(len(rows)), 0, rows] = _IMPULSE
        parts.append((_apply(aligner, like, struck) - base) / _IMPULSE)
    return torch.cat(parts).transpose(0, 1)


def _n_answering(response: Float[Tensor, "tokens f out"]) -> int:
    """How many tokens an impulse is seen in, at least one."""
    sizes = response.flatten(1).norm(dim=-1)
    seen = (sizes > _ROUNDING * sizes.max()).nonzero()
    return int(seen[-1]) + 1 if len(seen) else 1


def _check(aligner: Aligner, like: KV, response: Float[Tensor, "tokens f out"]) -> None:
    """Raise `UncertifiableMap` unless random inputs of several sizes give what the response says."""
    n_tokens, n_features, _ = response.shape
    noise = torch.randn(2, n_tokens, n_features, generator=torch.Generator().manual_seed(0)).to(like.device)
    x = noise * torch.tensor([1.0, 30.0], device=like.device).view(2, 1, 1)
    got = _apply(aligner, like, x) - _apply(aligner, like, torch.zeros_like(x))
    want = torch.zeros_like(got)
    for back in range(n_tokens):
        want[:, back:] += x[:, : n_tokens - back] @ response[back]
    error, size = (part.flatten(1).norm(dim=-1) for part in (got - want, want))
    as_said = bool((error <= _TOLERANCE * size).all())  # False for NaN too
    if not as_said or _n_answering(response) == REACH:
        what = f"the map {aligner.name!r} is not affine, goes by a token's place, or looks back over {REACH} tokens"
        raise UncertifiableMap(what, cure="Certify a linear map, or measure the error: kvferry bench align")
