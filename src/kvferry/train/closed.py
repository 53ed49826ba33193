"""The closed form of each aligner that has one, from sums: where training starts, or all that is fitted."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.blockwise import Blockwise, layer_errors
from kvferry.align.classwise import Classwise
from kvferry.align.contract import Aligner, Contract
from kvferry.align.folder import aligner_class
from kvferry.align.headwise import HeadwiseProjector
from kvferry.align.kv_projector import KVCacheProjector
from kvferry.align.layer_map import LAYER_MAPS, Depths, LayerMap, NearestDepth, TopKSources
from kvferry.align.linear import Linear
from kvferry.align.low_rank import LowRank
from kvferry.align.mean_only import MeanOnly
from kvferry.align.narrow import NarrowMLP
from kvferry.align.procrustes import Procrustes
from kvferry.align.projector import Projector
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.ridge import Sums, solve
from kvferry.align.token_table import TokenTable
from kvferry.errors import BadSpec, UsageError
from kvferry.train.paired import Pairs
from kvferry.train.recipe import aligner_call

_PENALTY_OF_ERRORS = 1e-2

Solver = Callable[[Aligner, Pairs, float], None]
Errors = Callable[[], Float[Tensor, "receiver sender"]]


def fresh(spec: str, contract: Contract, pairs: Pairs, held_out: Callable[[], Sums]) -> Aligner:
    """A new aligner of this spec, between the models of the contract.

    `sources` may be a rule of `LAYER_MAPS`; one that chooses by error measures it on the sums that
    `held_out` gives. Raises what `rehearse` does.
    """

    def errors() -> Float[Tensor, "receiver sender"]:
        both = contract.sender, contract.receiver
        return layer_errors(pairs.sums, held_out(), *both, _PENALTY_OF_ERRORS).float()

    return _built(spec, contract, lambda: len(pairs.tokens), errors)


def rehearse(spec: str, contract: Contract) -> None:
    """Build the map of a spec without any pairs and throw it away: what cannot be built is known before texts are read.

    Raises `UnknownName` or `BadSpec` for a spec that cannot be read or names more layers than the sender has,
    `UsageError` for what the constructor refuses.
    """
    with torch.random.fork_rng(devices=[]):
        alike = torch.zeros(contract.receiver.n_layers, contract.sender.n_layers)
        _built(spec, contract, lambda: 1, lambda: alike)


def _built(spec: str, contract: Contract, n_tokens: Callable[[], int], errors: Errors) -> Aligner:
    name, options = aligner_call(spec)
    if isinstance(options.get("sources"), str):
        rule = LAYER_MAPS.parse(options["sources"])
        options["sources"] = [list(row) for row in rule(_depths(rule, contract, errors))]
    if name == TokenTable.name:
        options = {"n_tokens": n_tokens(), **options}
    return aligner_class(name)(contract, **options)


def _depths(rule: LayerMap, contract: Contract, errors: Errors) -> Depths:
    n_layers = contract.sender.n_layers
    if isinstance(rule, TopKSources | NearestDepth) and rule.k > n_layers:
        raise BadSpec(f"{rule!r} of {n_layers} sender layers", cure=f"Give a k of 1 to {n_layers}")
    depths = Depths(n_layers, contract.receiver.n_layers)
    return replace(depths, errors=errors()) if isinstance(rule, TopKSources) else depths


def solve_into(aligner: Aligner, pairs: Pairs, penalty: float) -> None:
    """Give an aligner its closed form, with the ridge `penalty`; what has none gets the scales of both models.

    Raises `UsageError` for classes without the receiver's grid.
    """
    if aligner.name in _SOLVERS:
        _SOLVERS[aligner.name](aligner, pairs, penalty)
    elif isinstance(aligner, Projector):
        aligner.fit_scale(pairs.sums)


def takes_penalty(name: str) -> bool:
    """Whether a ridge penalty has a say in an aligner's closed form."""
    return name in _SOLVERS and name not in (MeanOnly.name, TokenTable.name, Procrustes.name)


def neighbours_of(spec: str) -> int:
    """How many sender tokens the aligner of a spec sees for each token."""
    name, options = aligner_call(spec)
    parameter = inspect.signature(aligner_class(name)).parameters.get("neighbours")
    return 1 if parameter is None else options.get("neighbours", parameter.default)


def _by_class(pairs: Pairs) -> list[Sums]:
    if len(pairs.classes) == 1:
        raise UsageError("classes without the receiver's grid", cure="Fit with grid=receiver")
    return pairs.classes


def _linear(aligner: Aligner, pairs: Pairs, penalty: float) -> None:
    linear, (weight, bias) = cast(Linear, aligner), solve(pairs.sums, penalty)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)


def _residual_mlp(aligner: Aligner, pairs: Pairs, penalty: float) -> None:
    residual = cast(ResidualMLP, aligner)
    if residual.classes:
        residual.start_from_classes(_by_class(pairs), penalty)
    else:
        residual.start_from(pairs.sums, *solve(pairs.sums, penalty))


_SOLVERS: dict[str, Solver] = {
    "blockwise": lambda aligner, pairs, penalty: cast(Blockwise, aligner).solve_from(pairs.sums, penalty),
    "classwise": lambda aligner, pairs, penalty: cast(Classwise, aligner).solve_from(
        _by_class(pairs), penalty
    ),
    "headwise": lambda aligner, pairs, penalty: cast(HeadwiseProjector, aligner).start_from(
        pairs.sums, penalty
    ),
    "kv_projector": lambda aligner, pairs, penalty: cast(KVCacheProjector, aligner).start_from(
        pairs.sums, penalty
    ),
    "linear": _linear,
    "low_rank": lambda aligner, pairs, penalty: cast(LowRank, aligner).solve_from(pairs.sums, penalty),
    "mean_only": lambda aligner, pairs, _: cast(MeanOnly, aligner).solve_from(pairs.sums),
    "narrow": lambda aligner, pairs, penalty: cast(NarrowMLP, aligner).start_from([pairs.sums], penalty),
    "procrustes": lambda aligner, pairs, _: cast(Procrustes, aligner).solve_from(pairs.sums),
    "residual_mlp": _residual_mlp,
    "token_table": lambda aligner, pairs, _: cast(TokenTable, aligner).solve_from(pairs.tokens),
}
