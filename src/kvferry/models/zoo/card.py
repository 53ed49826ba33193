"""The README.md of a zoo folder: what the model is, how it was made, how well it reads."""

from dataclasses import dataclass
from pathlib import Path

from kvferry.models.zoo.recipes import Recipe

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# kvferry zoo: {name}

A {architecture} of {parameters:,} parameters that reads small English worlds and answers questions about them.
It knows nothing else: it exists to test and to teach how a KV cache is carried from one model to another.

    {{context}}
    Q: {{question}}
    A:

The model goes on with a space, the answer and a newline (`kvferry.models.zoo.worlds.prompt`).

## Scores

Exact match of the greedy answer on {n} held-out items per line (split `test`):

| task | exact match |
|---|---|
{scores}

Without the context it can only guess: 1 in 24 for towns, 1 in 32 for names.

## How it was made

    kvferry zoo train {name}

Seed {seed}, {steps} steps, {seconds:.0f} seconds with {threads} CPU thread{s}. Trained on generated text only.

Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Trained:
    """A finished training: the folder, how long it took with how many threads, exact match per task on n items."""

    path: Path
    parameters: int
    seconds: float
    threads: int
    scores: dict[str, float]
    n: int


def card(name: str, recipe: Recipe, trained: Trained) -> str:
    """The text of the card."""
    return _CARD.format(
        name=name,
        architecture=recipe.architecture,
        parameters=trained.parameters,
        n=trained.n,
        scores="\n".join(f"| {task} | {score:.3f} |" for task, score in trained.scores.items()),
        seed=recipe.seed,
        steps=recipe.steps,
        seconds=trained.seconds,
        threads=trained.threads,
        s="" if trained.threads == 1 else "s",
    )
