"""Fit a lightning indexer: its softmax is taught to be the attention of the model's own layers.

What it learns from is p(t, s), the attention of query t summed over all query heads of a layer and divided by its own
sum; what is minimised is KL(p || softmax of I) over the slots that t sees, with the model frozen (the dense warm-up of
DeepSeek-V3.2-Exp). A layer learns from its own attention alone, so all are trained at once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import UsageError
from kvferry.models.load import Model
from kvferry.models.scores import scores_of
from kvferry.select.indexer import Indexer, IndexerShape
from kvferry.train.attended import Attended, attend, held_out
from kvferry.train.examples import Batches, Example, Source
from kvferry.train.fit import frozen
from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.mass_held import CONTROLS, FEWEST_TOKENS, Held, Scorer, measure, of_indexer
from kvferry.train.reports import Step, Trained

DEFAULT_LOOP = LoopRecipe(steps=400, learning_rate=1e-2, warmup=20, evaluate_every=100)


@dataclass(frozen=True)
class IndexerRecipe:
    """The indexer's shape, and what it is trained on. Texts are read up to `max_tokens` tokens."""

    heads: int = 8
    dim: int = 64
    batch_size: int = 4
    max_tokens: int = 512
    n_dev: int = 16
    n_test: int = 64
    loop: LoopRecipe = field(default_factory=lambda: DEFAULT_LOOP)

    def __post_init__(self) -> None:
        least = dict.fromkeys(("heads", "dim", "batch_size", "n_dev", "n_test"), 1)
        for name, fewest in {**least, "max_tokens": FEWEST_TOKENS}.items():
            if getattr(self, name) < fewest:
                what = f"{name} is {getattr(self, name)}, out of range"
                raise UsageError(what, cure=f"Give at least {fewest}")


@dataclass(frozen=True)
class FittedIndexer:
    """An indexer, how training ended, and the mass it holds on texts of the test split, beside controls."""

    indexer: Indexer
    recipe: IndexerRecipe
    trained: Trained
    held: list[Held]
    seconds: float


def fit_indexer(
    model: Model, source: Source, recipe: IndexerRecipe, on_step: Callable[[Step], None] | None = None
) -> FittedIndexer:
    """Train on the source's train split, choose on dev, measure on test.

    Raises `UsageError` for a source that has too little text, `TrainingDiverged` where numbers are none.
    """
    start = time.perf_counter()
    indexer = new_indexer(model, recipe)
    trained = train_scorer(indexer, of_indexer(indexer), model, source, recipe, on_step)
    held = measure({"lightning": of_indexer(indexer), **CONTROLS}, unseen_texts(model, source, recipe))
    return FittedIndexer(indexer, recipe, trained, held, time.perf_counter() - start)


def new_indexer(model: Model, recipe: IndexerRecipe) -> Indexer:
    """Untrained; the seed decides its weights."""
    hidden = model.hf.config.get_text_config(decoder=True).hidden_size
    shape = IndexerShape(hidden, recipe.heads, recipe.dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.loop.seed)
        return Indexer(model.geometry, shape).to(model.device)


def unseen_texts(model: Model, source: Source, recipe: IndexerRecipe) -> Iterator[Attended]:
    """What nothing was trained or chosen on."""
    return held_out(
        model, source, scores_of(model), split="test", n_texts=recipe.n_test, max_tokens=recipe.max_tokens
    )


def train_scorer(
    module: nn.Module,
    scorer: Scorer,
    model: Model,
    source: Source,
    recipe: IndexerRecipe,
    on_step: Callable[[Step], None] | None = None,
) -> Trained:
    """Train whatever scores tokens for queries; `module` holds its weights."""
    scores, loop = scores_of(model), recipe.loop
    read = partial(attend, model, scores=scores, max_tokens=recipe.max_tokens)
    dev = list(
        held_out(model, source, scores, split="dev", n_texts=recipe.n_dev, max_tokens=recipe.max_tokens)
    )

    def loss(step: int, rows: Sequence[Example]) -> Loss:
        return divergence(scorer, read([row.context for row in rows]))

    def evaluate() -> float:
        found = [divergence(scorer, seen) for seen in dev]
        return sum(one.total.item() for one in found) / sum(one.n for one in found)

    examples = Batches(source, "train", loop.seed, recipe.batch_size)
    with frozen(model):
        return Trainer(module, loss, examples, loop, evaluate=evaluate, on_step=on_step).run()


def divergence(scorer: Scorer, seen: Attended) -> Loss:
    """KL(p || softmax of the scores), mean over layers, summed over the tokens of a batch."""
    n_layers, n_tokens = seen.kv.geometry.n_layers, seen.n_tokens
    each = [_kl(scorer(seen, layer, n_tokens), seen, layer) for layer in range(n_layers)]
    return Loss(torch.stack(each).mean(), int(seen.kv.present[0].sum()))


def _kl(scores: Float[Tensor, "batch tokens tokens"], seen: Attended, layer: int) -> Float[Tensor, ""]:
    shares, hidden = seen.shares(layer, seen.n_tokens), ~seen.visible(layer, seen.n_tokens)
    lowest = torch.finfo(torch.float32).min
    guess = scores.float().masked_fill(hidden, lowest).log_softmax(-1).masked_fill(hidden, 0.0)
    return torch.xlogy(shares, shares).sum() - (shares * guess).sum()
