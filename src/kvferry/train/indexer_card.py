"""The card of an indexer folder: whose attention it learned, and how much of it its slots hold."""

import platform
from collections.abc import Sequence

import torch

from kvferry.train.indexer_fit import FittedIndexer
from kvferry.train.mass_held import WINDOW, Held

_LEGEND = (
    "Median share, over held-out queries, of the attention that the best slots of a query would hold; each query with "
    f"slots of its own. Beside it the same for the last {WINDOW} queries together. `recent` is the last slots."
)


def indexer_card(fitted: FittedIndexer, model: str, data: str, command: str) -> str:
    """Markdown for the folder's README.md."""
    lines = [
        f"# Lightning indexer of {model}",
        "",
        *(f"- **{key}**: {value}" for key, value in _facts(fitted, data)),
    ]
    rows = [_row(held) for held in fitted.held]
    n_layers = len(fitted.held[0].queries)
    columns = [
        "scores",
        "slots kept",
        *(f"layer {layer}" for layer in range(n_layers)),
        "last queries, worst layer",
    ]
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    table = [_line(columns), "|" + "|".join(rule) + "|", *map(_line, rows)]
    return "\n".join([*lines, "", _LEGEND, "", *table, "", f"Made by `{command}`.", ""])


def _facts(fitted: FittedIndexer, data: str) -> list[tuple[str, str]]:
    geometry, shape, recipe = fitted.indexer.geometry, fitted.indexer.shape, fitted.recipe
    n_weights = sum(tensor.numel() for tensor in fitted.indexer.parameters())
    loop, trained = recipe.loop, fitted.trained
    return [
        ("model", f"{geometry.model[:16]}, tokenizer {geometry.tokenizer[:16]}"),
        ("indexer", f"{shape.heads} heads of {shape.dim} channels, {n_weights:,} weights"),
        ("data", f"{data}, up to {recipe.max_tokens} tokens of a text"),
        (
            "training",
            f"{loop.steps} steps of {recipe.batch_size} texts at {loop.learning_rate:g}, seed {loop.seed}; KL on dev "
            f"{trained.best_loss or trained.loss:.4f} nats after {trained.best_step} steps",
        ),
        ("measured", f"{fitted.held[0].n_queries} queries per layer of {recipe.n_test} texts"),
        ("time", f"{fitted.seconds:.0f} s, {torch.get_num_threads()} threads of {platform.machine()}"),
    ]


def _row(held: Held) -> list[str]:
    by_layer = [f"{share:.3f}" for share in held.queries]
    return [held.name, f"{held.proportion:.0%}", *by_layer, f"{min(held.windows):.3f}"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
