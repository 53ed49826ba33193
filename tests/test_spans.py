"""Tokens of two models correspond by the bytes they stand for: no byte lost, none counted twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kvferry.align.spans import overlap
from kvferry.kv import Role
from kvferry.models.tokens import byte_ranges, encode

CORPUS = [
    "Ann keeps the ring in the barn. Bob met Cleo. " * 20,
    "Grüße aus 北京 und Zürich 🎈 an alle. " * 20,
]
TEXTS = st.text(st.sampled_from("ab eéü 北京🎈👩‍👧.\n"), min_size=1, max_size=40)


def byte_level_bpe(n_merges: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: several tokens may share one character."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {"bytes": byte_level_bpe(0), "small": byte_level_bpe(40), "large": byte_level_bpe(150)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_spans_tile_the_bytes_of_a_text(name, text):
    spans = encode(TOKENIZERS[name], [text]).spans[0]
    assert spans.start[0] == 0 and spans.end[-1] == len(text.encode())
    assert np.array_equal(spans.start[1:], spans.end[:-1])
    assert set(spans.role) == {Role.TEXT}


@given(text=TEXTS)
@pytest.mark.parametrize(("one", "other"), [("bytes", "large"), ("large", "bytes"), ("small", "large")])
def test_weights_sum_to_one_and_no_byte_is_lost(one, other, text):
    a, b = (encode(TOKENIZERS[name], [text]).spans[0] for name in (one, other))
    weights = overlap(a, b)
    assert np.allclose(weights[a.end > a.start].sum(1), 1, atol=1e-6)
    carried = (weights * (a.end - a.start)[:, None]).sum(0)
    assert np.allclose(carried, b.end - b.start, atol=1e-4)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equal_tokenizers_give_the_identity(name):
    spans = encode(TOKENIZERS[name], ["Ann keeps 北京 in the barn 🎈."]).spans[0]
    assert np.array_equal(overlap(spans, spans), np.eye(len(spans), dtype=np.float32))


def test_special_and_padding_tokens_pair_with_nothing():
    rows = encode(TOKENIZERS["small"], ["Ann", "Ann met Bob."])
    padded, other = rows.spans
    assert padded.role[0] == Role.PAD
    weights = overlap(padded, other)
    assert weights[padded.role == Role.PAD].sum() == 0


def test_tokens_that_share_a_character_share_its_bytes_in_order():
    start, end = byte_ranges("🎈x", [(0, 1), (0, 1), (0, 1), (0, 1), (1, 2)])
    assert list(zip(start, end, strict=True)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
