"""Fit a profile: means and deviations of a model's cache, and the weight of each channel's step.

Steps follow the Fisher information F: how much the model's own predictions move when the channels of a head do. One
backward pass from continuations drawn from the model itself gives it for all heads. F = A' D A, with A unit lower
triangular: A shapes the noise (kvferry.codec.ecsq.shaping), and steps proportional to D**-1/2 spend it where it is felt
least (Cover & Thomas, chapter 10, with the error of a uniform step, step**2 / 12).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from kvferry.codec.profile import Profile
from kvferry.errors import UsageError
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Geometry, Group
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.relay import take_over
from kvferry.models.tokens import Tokens
from kvferry.train.answer_loss import continuations
from kvferry.train.examples import Source, Split
from kvferry.train.fit import frozen
from kvferry.train.paired import batches
from kvferry.wire.fields import STEPS_PER_OCTAVE

_SMALLEST = 2.0**-60


@dataclass(frozen=True)
class ProfileRecipe:
    """`draws` continuations of each context are drawn. To a head's matrix are added `floor` of its block's mean and
    `ridge` of its own diagonal, for there is little data. Deviations are those of what is rounded at `usual_step`."""

    n_contexts: int = 128
    draws: int = 3
    floor: float = 0.01
    ridge: float = 0.03
    usual_step: int = 32
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_contexts", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", cure="Give at least 1")
        for name in ("floor", "ridge"):
            if not 0 < getattr(self, name) < 1e6:
                raise UsageError(f"{name} is {getattr(self, name)}", cure="Give a share above 0")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}", cure="Give at least 0")


Information = Float64[np.ndarray, "heads dim dim"]
"""Of one block: how the predictions move with the channels of each head."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: for each channel of ones, numbers and squares; for each head of products of gradients."""

    n_tokens: Float64[np.ndarray, " channels"]
    total: Float64[np.ndarray, " channels"]
    squares: Float64[np.ndarray, " channels"]
    information: list[Information]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.n_tokens + other.n_tokens,
            self.total + other.total,
            self.squares + other.squares,
            [mine + theirs for mine, theirs in zip(self.information, other.information, strict=True)],
        )


Case = tuple[KV, Tokens, Bool[Tensor, "batch after"]]
"""Caches, what is read behind them, and which of those tokens the model predicts."""


def fit_profile(model: Model, source: Source, recipe: ProfileRecipe) -> Profile:
    """The profile of a model, from the source's train split.

    Raises `UsageError` where a number of the recipe is out of range.
    """
    profile = profile_of(model, _cases(model, source, "train", recipe), recipe)
    return replace(profile, fitted={"source": source.name, **asdict(recipe)})


def profile_of(model: Model, cases: Iterable[Case], recipe: ProfileRecipe) -> Profile:
    """The profile of a model from prepared cases."""
    generator = torch.Generator(device="cpu").manual_seed(recipe.seed)
    with frozen(model):
        moments = reduce(Moments.__add__, (_moments(model, case, recipe, generator) for case in cases))
    geometry, mean = model.geometry, moments.total / moments.n_tokens
    variance = np.maximum(moments.squares / moments.n_tokens - mean**2, _SMALLEST**2)
    factors = [_factors(information, recipe) for information in moments.information]
    weight = _weights(np.concatenate([felt.ravel() for _, felt in factors]), variance, _blocks(geometry))
    return Profile(
        geometry.model,
        geometry.shape_digest(),
        geometry.tokenizer,
        mean.astype(np.float32),
        np.rint(
            STEPS_PER_OCTAVE
            * 0.5
            * np.log2(_shaped_variance(variance, weight + recipe.usual_step / STEPS_PER_OCTAVE, factors))
        ).astype(np.int16),
        np.rint(STEPS_PER_OCTAVE * weight).astype(np.int16),
        np.concatenate([_below(shaping) for shaping, _ in factors]).astype(np.float16),
    )


def _factors(
    information: Information, recipe: ProfileRecipe
) -> tuple[Float64[np.ndarray, "heads dim dim"], Float64[np.ndarray, "heads dim"]]:
    """A and D of F = A' D A, head by head. A Cholesky factor is lower triangular times its transpose; turning the
    matrix upside down gives the order that is needed here, in which early channels are rounded first."""
    diagonal = np.diagonal(information, axis1=1, axis2=2)
    added = recipe.floor * diagonal.mean() + recipe.ridge * diagonal + _SMALLEST**2
    matrix = information + added[..., None] * np.eye(information.shape[1])
    lower = np.linalg.cholesky(matrix[:, ::-1, ::-1])
    pivots = np.diagonal(lower, axis1=1, axis2=2)
    return (lower / pivots[:, None])[:, ::-1, ::-1].transpose(0, 2, 1), (pivots**2)[:, ::-1]


def _shaped_variance(
    variance: Float64[np.ndarray, " channels"],
    octaves: Float64[np.ndarray, " channels"],
    factors: Sequence[tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]],
) -> Float64[np.ndarray, " channels"]:
    """What is rounded varies more than the channel: by the errors before it, at steps of these octaves.

    An error is that of a step, step**2 / 12, until the step is so coarse that the number itself is lost.
    """
    found, at = [], 0
    for shaping, felt in factors:
        own = variance[at : at + felt.size].reshape(felt.shape)
        lost = 4.0 ** octaves[at : at + felt.size].reshape(felt.shape) / 12
        total = own.copy()
        for place in range(1, felt.shape[1]):
            errors = np.minimum(lost, total)[:, :place]
            total[:, place] += (shaping[:, place, :place] ** 2 * errors).sum(axis=1)
        found.append(total.ravel())
        at += felt.size
    return np.concatenate(found)


def _below(matrices: Float64[np.ndarray, "heads dim dim"]) -> Float64[np.ndarray, " entries"]:
    rows, columns = np.tril_indices(matrices.shape[1], -1)
    return matrices[:, rows, columns].ravel()


def _weights(
    felt: Float64[np.ndarray, " channels"],
    variance: Float64[np.ndarray, " channels"],
    blocks: Sequence[slice],
) -> Float64[np.ndarray, " channels"]:
    """Octaves of the steps. On average over channels they are those of steps that follow each block's deviation, so
    that a step means about as many bits with a profile as without."""
    own = -0.5 * np.log2(felt)
    even = np.concatenate([np.full_like(variance[b], 0.5 * np.log2(variance[b].mean())) for b in blocks])
    return own - own.mean() + even.mean()


def _blocks(geometry: Geometry) -> list[slice]:
    """The channels of each layer's keys and values, in the order of a profile."""
    sizes = [layer.heads * dim for layer in geometry.layers for dim in (layer.key_dim, layer.value_dim)]
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _cases(model: Model, source: Source, split: Split, recipe: ProfileRecipe) -> Iterable[Case]:
    examples = list(islice(source.examples(split, recipe.seed), recipe.n_contexts))
    for batch in batches(examples, recipe.batch_size):
        after = continuations(model, batch)
        kv = text_slots(capture(model, [example.context for example in batch]).kv)
        yield kv, after.tokens, after.scored


def _moments(model: Model, case: Case, recipe: ProfileRecipe, generator: torch.Generator) -> Moments:
    kv, after, scored = case
    draws = [_information(model, kv, after, scored, generator) for _ in range(recipe.draws)]
    return Moments(
        _channel_sums(kv, torch.ones_like),
        _channel_sums(kv, lambda x: x),
        _channel_sums(kv, torch.square),
        [np.mean(products, axis=0) for products in zip(*draws, strict=True)],
    )


def _information(
    model: Model, kv: KV, after: Tokens, scored: Bool[Tensor, "batch after"], generator: torch.Generator
) -> list[Information]:
    """Products of gradients of the log-probability of targets drawn from the model's own predictions."""
    leaves = tuple(
        Group(g.layers, g.keys.detach().float().requires_grad_(), g.values.detach().float().requires_grad_())
        for g in kv.groups
    )
    _, logits = take_over(model, kv.with_groups(leaves), 1.0, after, keep=0)
    # Token i is predicted by what was read up to i - 1.
    own = logits[:, :-1][scored[:, 1:].to(logits.device)].float().log_softmax(-1)
    drawn = torch.multinomial(own.detach().exp().cpu(), 1, generator=generator).to(own.device)
    own.gather(-1, drawn).sum().backward()
    gradients = kv.with_groups(tuple(_gradient(group) for group in leaves))
    return [
        _products(kv, layer, part) for layer in range(kv.geometry.n_layers) for part in gradients.layer(layer)
    ]


def _products(kv: KV, layer: int, gradient: Tensor) -> Information:
    slots = kv.present[layer][:, None, :, None]
    rows = torch.where(slots, gradient.double(), 0.0).transpose(0, 1).flatten(1, 2)
    return (rows.transpose(1, 2) @ rows).cpu().numpy()


def _gradient(group: Group) -> Group:
    keys, values = (
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (group.keys, group.values)
    )
    return Group(group.layers, keys, values)


def _channel_sums(kv: KV, of: Callable[[Tensor], Tensor]) -> Float64[np.ndarray, " channels"]:
    """Sums over the slots that are held, of some function of each number, in the order of a profile."""
    sums = []
    for layer in range(kv.geometry.n_layers):
        slots = kv.present[layer][:, None, :, None]
        for part in kv.layer(layer):
            numbers = torch.where(slots, of(part.detach().double()), 0.0)
            sums.append(numbers.sum((0, 2)).flatten().cpu().numpy())
    return np.concatenate(sums)
