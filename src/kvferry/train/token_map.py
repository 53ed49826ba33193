"""What an aligner does to an error of its input: the Lipschitz constants of its map from token to token.

An affine map is found out by asking it (its response to an impulse in each feature of one token), whatever its class;
it must then do to other inputs, at other places, what that response says. A map with activations is taken apart by the
function for its name in `_COMPOSED`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.contract import Aligner
from kvferry.align.features import flatten, unflatten
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.errors import UncertifiableMap
from kvferry.kv import KV, Geometry
from kvferry.metrics.lipschitz import module_norm, require_slope, sequence_norm, spectral_norm

REACH = 12
"""Tokens of the probes: a map that looks back further is not certified."""
_IMPULSE = 64.0  # a power of two, large beside biases, so that their difference is exact enough
_TOLERANCE = 1e-3
_ROUNDING = 1e-5
"""Of the largest response: below it a token is held to answer nothing."""
_CHUNK = 64


@dataclass(frozen=True)
class Path:
    """One summand of a map: something of Lipschitz constant `before`, then a linear map to the features `places`."""

    places: Int[Tensor, " some"]
    last: Float[Tensor, "some width"]
    before: float = 1.0

    def to(self, features: Int[Tensor, " few"]) -> Float[Tensor, "few width"]:
        return self.last[torch.isin(self.places, features.to(self.places.device))]


@dataclass(frozen=True)
class TokenMap:
    """Receiver token t as a sum of paths from sender tokens t, t - 1, ..., side by side (`neighbours` of them)."""

    neighbours: int
    paths: tuple[Path, ...]

    def norm(self, features: Int[Tensor, " some"]) -> float:
        """Lipschitz constant of some features of a receiver token, of the sender tokens side by side."""
        return sum(path.before * spectral_norm(path.to(features)) for path in self.paths)

    def sequence_norm(self, features: Int[Tensor, " some"]) -> float | None:
        """Upper bound of the same over whole sequences at once; None for a map that is not affine."""
        if len(self.paths) != 1:
            return None
        blocks = self.paths[0].to(features).unflatten(-1, (self.neighbours, -1))
        return sequence_norm(blocks.transpose(0, 1))


@torch.no_grad()
def token_map(aligner: Aligner, like: KV) -> TokenMap:
    """The map of an aligner, exact if it is affine. `like` is a cache of the sender: spans and positions to ask with.

    Raises `UncertifiableMap` for a map that is neither affine nor known, or that goes by a token's place.
    """
    if aligner.name in _COMPOSED:
        return _COMPOSED[aligner.name](aligner)
    for module in aligner.modules():
        require_slope(module)
    like = _probe(like)
    response = _impulse_response(aligner, like)
    _check(aligner, like, response)
    n = _n_answering(response)
    return TokenMap(n, (_everywhere(torch.cat(list(response[:n].transpose(1, 2)), -1)),))


def _everywhere(last: Float[Tensor, "out width"], before: float = 1.0) -> Path:
    return Path(torch.arange(len(last), device=last.device), last, before)


def receiver_features(
    geometry: Geometry, layer: int
) -> tuple[Int[Tensor, "heads key_dim"], Int[Tensor, "heads value_dim"]]:
    """Which features of a receiver token are the keys and the values of a layer, by head."""
    numbers = torch.arange(geometry.floats_per_token, dtype=torch.float64).view(1, 1, -1)
    group = next(group for group in unflatten(numbers, geometry) if layer in group.layers)
    row = group.layers.index(layer)
    return group.keys[row, 0, :, 0].long(), group.values[row, 0, :, 0].long()


def _probe(like: KV) -> KV:
    """The first tokens of the first sequence, all of them present."""
    short = next(like.sequences())
    short = short.take_tokens(torch.arange(min(REACH, short.n_tokens), device=like.device))
    return replace(short, present=torch.ones_like(short.present))


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


def _residual_mlp(aligner: Aligner) -> TokenMap:
    plain = cast(ResidualMLP, aligner).fold()
    through = module_norm(nn.Sequential(plain.up, nn.GELU()))
    return TokenMap(plain.neighbours, (_everywhere(plain.inner.T), _everywhere(plain.down.weight, through)))


_COMPOSED: dict[str, Callable[[Aligner], TokenMap]] = {"residual_mlp": _residual_mlp}
