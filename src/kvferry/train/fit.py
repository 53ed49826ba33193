"""Fit an aligner between two models: ridge in closed form, then trained by the receiver's answers.

A map fitted on clean caches fails under a coarse codec, and one fitted on int4 alone fails on raw. So the ridge sums
the statistics of all codecs, and every training batch passes through the next one of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import flatten, unflatten
from kvferry.align.identity import Identity
from kvferry.align.linear import Linear, affine
from kvferry.align.ridge import solve
from kvferry.align.zero_pad import ZeroPad
from kvferry.codec import CODECS, Codec, roundtrip
from kvferry.errors import ModelRefused, UsageError
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Roundtrip
from kvferry.models.capture import capture
from kvferry.models.fingerprint import model_fingerprint
from kvferry.models.load import Model
from kvferry.train.answer_loss import answer_scores, continuations
from kvferry.train.examples import Example, Source, Split
from kvferry.train.paired import Pairs, batches, collect
from kvferry.train.whitened import Whitened

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
N_HELD_OUT = 128
DEFAULT_CODECS = (
    "raw(dtype=float16, zstd=0)",
    "int(bits=8, group=32, axis=token, centred=False, scale=float16, zstd=0)",
    "int(bits=4, group=32, axis=channel, centred=False, scale=float16, zstd=0)",
    "int(bits=4, group=32, axis=token, centred=False, scale=float16, zstd=0)",
    "ecsq(step=-64, weighting=layer, profile=none)",
    "ecsq(step=0, weighting=layer, profile=none)",
)
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a fit, beside models and data. `steps=0` is the ridge alone."""

    codecs: tuple[str, ...] = DEFAULT_CODECS
    n_texts: int = 512
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 7e-4
    neighbours: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        self.parsed()
        least = {"codecs": len(self.codecs), "texts": self.n_texts, "batch size": self.batch_size}
        least |= {"neighbours": self.neighbours, "steps + 1": self.steps + 1}
        for name, value in least.items():
            if value < 1:
                raise UsageError(f"{name} is {value}, out of range", cure="Give at least 1")
        if not self.learning_rate > 0:
            raise UsageError(
                f"learning rate is {self.learning_rate}, out of range", cure="Give a positive one"
            )

    def parsed(self) -> list[Codec]:
        return [CODECS.parse(spec) for spec in self.codecs]


@dataclass(frozen=True)
class CodecScore:
    """Held-out quality under one codec: nats per scored token, share of answers right."""

    codec: str
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Fitted:
    """An aligner and how it came about. Scores are held out; `controls` say what they are worth."""

    aligner: Linear
    recipe: Recipe
    source: str
    penalty: float
    seconds: float
    ridge_scores: list[CodecScore]
    scores: list[CodecScore]
    controls: list[CodecScore]


@dataclass(frozen=True)
class Pair:
    """What a fit works on."""

    sender: Model
    receiver: Model
    source: Source
    recipe: Recipe

    def take(self, split: Split, n: int) -> list[Example]:
        """The first `n` examples of a split."""
        return list(islice(self.source.examples(split, self.recipe.seed), n))


def fit(
    sender: Model, receiver: Model, source: Source, recipe: Recipe, *, on_step: OnStep | None = None
) -> Fitted:
    """Fit on the source's train split; the penalty is chosen on dev, scores are from test.

    Raises `UsageError` where the models share no text, or the loss is not finite.
    """
    start = time.perf_counter()
    pair, codecs = Pair(sender, receiver, source, recipe), recipe.parsed()
    pairs = _collect(pair, codecs)
    contract = Contract(
        sender=sender.geometry,
        receiver=receiver.geometry,
        coded_with=tuple(repr(codec.agreed()) for codec in codecs),
        stride=pairs.stride,
    )
    with frozen(receiver):
        aligner, penalty = _ridge(pair, contract, pairs, codecs)
        test = pair.take("test", N_HELD_OUT)
        ridge_scores = [score(pair, aligner, codec, test) for codec in codecs]
        if recipe.steps:
            _train(pair, aligner, pairs, codecs, on_step)
        scores = [score(pair, aligner, codec, test) for codec in codecs] if recipe.steps else ridge_scores
        controls = score_controls(pair, aligner, test)
    return Fitted(
        aligner, recipe, source.name, penalty, time.perf_counter() - start, ridge_scores, scores, controls
    )


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No gradient reaches the model's weights; checked afterwards to be what they were."""
    before = model_fingerprint(model.hf, model.geometry.layers)
    trainable = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    if model_fingerprint(model.hf, model.geometry.layers) != before:
        raise ModelRefused(
            f"the weights of {model.name} changed during the fit", cure="Fit on a model in eval mode"
        )


@torch.no_grad()
def score(pair: Pair, aligner: Aligner, codec: Codec, examples: Sequence[Example]) -> CodecScore:
    """Held-out quality of an aligner under one codec."""
    return _score(pair, aligner, repr(codec), examples, partial(roundtrip, codec))


@torch.no_grad()
def score_controls(pair: Pair, aligner: Aligner, examples: Sequence[Example]) -> list[CodecScore]:
    """Scores of the receiver's own cache, of the sender's with only its shape fitted, and of one without content."""
    own = Contract(sender=pair.receiver.geometry, receiver=pair.receiver.geometry)
    alone = replace(pair, sender=pair.receiver)
    return [
        _score(alone, Identity(own), "the receiver's own cache", examples, lambda kv: kv),
        _score(pair, ZeroPad(aligner.contract), "cut or padded with zeros", examples, lambda kv: kv),
        _score(pair, aligner, "mean cache", examples, mean_cache),
    ]


def mean_cache(kv: KV) -> KV:
    """Each present slot holds the mean over all present slots of the batch."""
    held = kv.present.all(0).unsqueeze(-1)
    features = flatten(kv)
    mean = (features * held).sum((0, 1), keepdim=True) / held.sum()
    return kv.with_groups(unflatten(mean.expand_as(features), kv.geometry))


def _score(
    pair: Pair, aligner: Aligner, name: str, examples: Sequence[Example], trip: Roundtrip
) -> CodecScore:
    nats, n_tokens, n_pieces, n_right = 0.0, 0, 0, 0
    for batch in batches(examples, 32):
        aligned = aligner(trip(_sent(pair.sender, batch)))
        got = answer_scores(
            pair.receiver, aligned, continuations(pair.receiver, batch), aligner.contract.stride
        )
        nats, n_tokens = nats + float(got.nats), n_tokens + got.n_tokens
        n_pieces, n_right = n_pieces + got.n_pieces, n_right + got.n_right
    return CodecScore(name, nats / n_tokens, n_right / n_pieces)


def _sent(sender: Model, examples: Sequence[Example]) -> KV:
    return text_slots(capture(sender, [example.context for example in examples]).kv)


def _collect(pair: Pair, codecs: Sequence[Codec]) -> Pairs:
    texts = [example.context for example in pair.take("train", pair.recipe.n_texts)]
    trips: list[Roundtrip] = [partial(roundtrip, codec) for codec in codecs]
    return collect(pair.sender, pair.receiver, texts, trips, neighbours=pair.recipe.neighbours)


def _ridge(pair: Pair, contract: Contract, pairs: Pairs, codecs: Sequence[Codec]) -> tuple[Linear, float]:
    """The penalty whose map the receiver answers best from, over all codecs, on dev."""
    dev = pair.take("dev", N_HELD_OUT // 2)
    found: list[tuple[float, float, Linear]] = []
    for penalty in PENALTIES:
        aligner = Linear(contract, pair.recipe.neighbours).to(pair.receiver.device)
        _set(aligner, *solve(pairs.sums, penalty))
        losses = [score(pair, aligner, codec, dev).loss for codec in codecs]
        found.append((sum(losses), penalty, aligner))
    _, penalty, aligner = min(found, key=lambda row: row[0])
    return aligner, penalty


def _train(
    pair: Pair, aligner: Linear, pairs: Pairs, codecs: Sequence[Codec], on_step: OnStep | None
) -> None:
    whitened = Whitened(pairs.sums, aligner.weight.detach().cpu(), aligner.bias.detach().cpu())
    whitened = whitened.to(pair.receiver.device)
    optimizer = torch.optim.Adam(whitened.parameters(), pair.recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, n_steps=pair.recipe.steps))
    examples = pair.source.examples("train", pair.recipe.seed + 1)
    for step in range(pair.recipe.steps):
        batch = list(islice(examples, pair.recipe.batch_size))
        loss = _loss(pair, aligner.contract, whitened, codecs[step % len(codecs)], batch)
        if not bool(loss.isfinite()):
            cure = "Lower the learning rate, or look for NaN in the models"
            raise UsageError(f"the loss is {loss.item()} at step {step}", cure=cure)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(whitened.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    weight, bias = whitened()
    _set(aligner, weight, bias)


def _loss(
    pair: Pair, contract: Contract, whitened: Whitened, codec: Codec, batch: Sequence[Example]
) -> Float[Tensor, ""]:
    """The receiver's answer loss through one codec; differentiable in the map only."""
    weight, bias = whitened()
    aligned = affine(roundtrip(codec, _sent(pair.sender, batch)), weight, bias, contract)
    return answer_scores(pair.receiver, aligned, continuations(pair.receiver, batch), contract.stride).loss


def _rate(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))


def _set(aligner: Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        aligner.weight.copy_(weight)
        aligner.bias.copy_(bias)
