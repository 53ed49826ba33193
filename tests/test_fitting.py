"""Examples that do not fit a model's positions are passed over, and said where all of them are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from kvferry.errors import ContextTooLong
from kvferry.models.load import Model, load
from kvferry.models.tokens import encode
from kvferry.train.sources.example import Example, Split
from kvferry.train.sources.fitting import Fitting


@dataclass(frozen=True)
class Given:
    texts: tuple[str, ...]
    name: str = "given"

    def examples(self, split: Split, seed: int) -> Iterator[Example]:
        while True:
            yield from (Example(text, ((" and so on", True),)) for text in self.texts)


def with_positions(model: Model, n: int) -> Model:
    return replace(model, geometry=replace(model.geometry, max_positions=n))


def test_only_what_fits_both_models_comes_through():
    llama, qwen3 = load("llama"), load("qwen3")
    short, long = "Ann has tea.", "Ann has tea in Oslo. " * 6
    needed = encode(qwen3.tokenizer, [long]).ids.shape[1]
    tight = with_positions(qwen3, needed)  # the context alone would fit, not what follows it
    found = list(islice(Fitting(Given((short, long)), llama, tight).examples("train", 0), 3))
    assert [example.context for example in found] == [short] * 3
    assert Fitting(Given((short, long)), llama, tight).n_left_out("train", 0, 3) == 2
    found = list(islice(Fitting(Given((short, long)), llama, qwen3).examples("train", 0), 3))
    assert [example.context for example in found] == [short, long, short]
    assert Fitting(Given((short, long)), llama, qwen3).n_left_out("train", 0, 3) == 0


def test_the_sender_reads_the_context_alone():
    llama, qwen3 = load("llama"), load("qwen3")
    text = "Ann has tea in Oslo. " * 6
    needed = encode(llama.tokenizer, [text]).ids.shape[1] + llama.head.ids.shape[1]
    fits = Fitting(Given((text,)), with_positions(llama, needed), qwen3).examples("train", 0)
    assert next(fits).context == text
    with pytest.raises(ContextTooLong, match="200 texts in a row"):
        next(Fitting(Given((text,)), with_positions(llama, needed - 1), qwen3).examples("train", 0))
