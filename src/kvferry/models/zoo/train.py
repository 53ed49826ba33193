"""From a recipe to a folder: `train_zoo("llama", out_dir)`.

First the model copies random tokens, then it reads few facts, then many, then long contexts: thrown into the facts
at once it would guess by type for thousands of steps, and one that has seen eight facts at most fails at 32.
"""

import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from kvferry.errors import UnknownName
from kvferry.models.zoo.batches import Batch, batches
from kvferry.models.zoo.card import Trained, card
from kvferry.models.zoo.catalog import load_folder
from kvferry.models.zoo.evaluate import score
from kvferry.models.zoo.recipes import RECIPES, Recipe, Stage, n_steps
from kvferry.models.zoo.start import untrained
from kvferry.models.zoo.tokenizers import TOKENIZERS, fast


def train_zoo(name: str, out_dir: str | Path, progress: bool = True, n_scored: int = 500) -> Trained:
    """Train a member from its seed and write its folder `out_dir/name`, scored on `n_scored` items per task."""
    if name not in RECIPES:
        raise UnknownName("zoo model", name, RECIPES)
    recipe, path = RECIPES[name], Path(out_dir) / name
    tokenizer = TOKENIZERS[recipe.tokenizer]()
    model = untrained(recipe, tokenizer)
    started = time.perf_counter()
    with Progress(disable=not progress) as bar:
        task = bar.add_task(name, total=recipe.steps)
        for loss in _steps(model, tokenizer, recipe):
            bar.update(task, advance=1, description=f"{name} loss {loss:.2f}")
    seconds = time.perf_counter() - started
    _save(model, tokenizer, path)
    scores = score(*load_folder(path), n=n_scored)
    trained = Trained(path, model.num_parameters(), seconds, torch.get_num_threads(), scores, n_scored)
    (path / "README.md").write_text(card(name, recipe, trained), encoding="utf-8")
    return trained


def _steps(model: PreTrainedModel, tokenizer: Tokenizer, recipe: Recipe) -> Iterator[float]:
    """Train through all stages; the loss of each step."""
    for number, stages in enumerate(recipe.rounds):
        optimizers = _optimizers(model, recipe, share=0.5**number)
        rate = partial(recipe.rate, steps=n_steps(stages))
        schedules = [LambdaLR(optimizer, rate) for optimizer in optimizers]
        for batch in _curriculum(tokenizer, stages, seed=1000 * (recipe.seed + 10 * number)):
            loss = _loss(model.train(), batch, recipe.context_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for step in (*optimizers, *schedules):
                step.step()
            model.zero_grad()
            yield loss.item()


def _curriculum(tokenizer: Tokenizer, stages: tuple[Stage, ...], seed: int) -> Iterator[Batch]:
    for number, stage in enumerate(stages):
        yield from islice(batches(stage, tokenizer, seed=seed + number), stage.steps)


def _optimizers(model: PreTrainedModel, recipe: Recipe, share: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the rest: half the steps of Adam alone.

    Both rates are that `share` of the recipe's.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=share * recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=share * recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _loss(model: PreTrainedModel, batch: Batch, context_weight: float) -> Tensor:
    """Of the answers, and a little of everything else, so that it remains a language model."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    learned = batch.learned[:, 1:].flatten()
    other = batch.real[:, 1:].flatten() & ~learned
    return each[learned].mean() + context_weight * each[other].mean()


def _save(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> None:
    model.save_pretrained(path)
    fast(tokenizer).save_pretrained(path)
