"""How well a model of the zoo reads: exact match of the greedy answer, on worlds that no model was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvferry.models.zoo.catalog import load
from kvferry.models.zoo.worlds import Item, Split, make_item

_BATCH_TOKENS = 16384
_MAX_ANSWER = 12


@dataclass(frozen=True)
class Task:
    """Items of one kind and size; `n_tokens`, if given, is filled up with fillers."""

    name: str
    kind: str
    n_facts: int
    n_tokens: int | None = None


TASKS = (
    Task("place, 8 facts", "place", 8),
    Task("place, 32 facts", "place", 32),
    Task("place, needle in 512 tokens", "place", 1, 512),
    Task("met, 8 facts", "met", 8),
    Task("met, 32 facts", "met", 32),
    Task("met, needle in 512 tokens", "met", 1, 512),
    Task("count, 8 facts", "count", 8),
    Task("two_hop, 8 facts", "two_hop", 8),
)


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 500) -> dict[str, float]:
    """Exact match on n items of each task."""
    return {task.name: accuracy(model, tokenizer, items(task, tokenizer, n)) for task in TASKS}


def evaluate_zoo(name: str, n: int = 500) -> dict[str, float]:
    """The scores of a member on n items per task: what its card states."""
    return score(*load(name), n=n)


def items(task: Task, tokenizer: PreTrainedTokenizerBase, n: int, split: Split = "test") -> list[Item]:
    """The first n items of a task; how many fillers make `n_tokens` depends on the tokenizer."""
    n_fillers = 0 if task.n_tokens is None else _fillers_for(task.n_tokens, tokenizer)
    return [
        make_item(seed, kind=task.kind, n_facts=task.n_facts, n_fillers=n_fillers, split=split)
        for seed in range(n)
    ]


def _fillers_for(n_tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    samples = [make_item(seed, kind="needle", n_fillers=20).context for seed in range(20)]
    per_sentence = sum(map(len, tokenizer(samples).input_ids)) / (20 * 21)
    return round(n_tokens / per_sentence)


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """What the model writes after each prompt until the line ends."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    generate: Any = model.generate
    size = max(1, _BATCH_TOKENS // max(len(ids) for ids in tokenizer(list(prompts)).input_ids))
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        inputs = tokenizer([prompts[i] for i in part], padding=True, return_tensors="pt")
        output = generate(**inputs, max_new_tokens=_MAX_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text.partition("\n")[0].strip()
    return answers


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> float:
    """The share of items that are answered exactly."""
    answers = greedy_answers(model, tokenizer, [item.prompt for item in items])
    return sum(answer == item.answer for answer, item in zip(answers, items, strict=True)) / len(items)
