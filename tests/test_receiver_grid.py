"""The receiver's token grid: pooled caches and the class of how each token lies to those it was pooled from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import contract
from kvferry.align.pooling import POOLINGS, pool
from kvferry.align.receiver_grid import N_CLASSES, classes_of, on_receiver_grid, overlap_class
from kvferry.errors import EmptyContext, GridMismatch, ShapeMismatch, WrongKeySpace
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Role, Spans, stack
from kvferry.models.capture import capture
from kvferry.models.load import load
from kvferry.models.tokens import encode

TEXTS = ["Ann keeps the ring in the barn.", "Bob has 北京 salt 🎈 and the rope of Cleo."]


def cut_at(*borders: int) -> Spans:
    """Text tokens that tile the bytes between these borders."""
    start, end = (np.array(part, np.int32) for part in (borders[:-1], borders[1:]))
    zeros = np.zeros(len(start), np.int32)
    return Spans(zeros, start, end, zeros.astype(np.uint8))


def cuts(n_bytes: int) -> st.SearchStrategy[Spans]:
    """Any way to cut so many bytes into tokens."""
    inner = st.sets(st.integers(1, n_bytes - 1))
    return inner.map(lambda found: cut_at(0, *sorted(found), n_bytes))


def cache_on(spans: Spans, seed: int = 0) -> KV:
    return contract.cache(n_tokens=len(spans), spans=(spans,), seed=seed)


CASES = [
    ((0, 3, 6), (0, 3, 6), [0, 0]),  # each from itself
    ((0, 3, 6), (0, 1, 3, 6), [1, 0]),  # the first from two
    ((0, 4, 6), (0, 1, 2, 3, 4, 6), [3, 0]),  # from four
    ((0, 6), (0, 1, 2, 3, 4, 5, 6), [3]),  # from six counts as four
    ((0, 3, 6), (0, 6), [4, 4]),  # one that reaches beyond
    ((0, 3, 6), (0, 2, 4, 6), [5, 5]),  # two, one of which does
    ((0, 2, 9), (0, 1, 3, 5, 7, 9), [5, 7]),  # reaches beyond in front
]


@pytest.mark.parametrize(("target", "source", "classes"), CASES)
def test_classes_by_hand(target, source, classes):
    assert overlap_class(cut_at(*target), cut_at(*source)).tolist() == classes


@given(target=cuts(12), source=cuts(12))
def test_classes_are_what_the_definition_says(target, source):
    for index, found in enumerate(overlap_class(target, source)):
        first, last = target.start[index], target.end[index]
        near = [
            (int(one), int(two))
            for one, two in zip(source.start, source.end, strict=True)
            if one < last and two > first
        ]
        beyond = any(one < first or two > last for one, two in near)
        assert found == min(len(near), 4) - 1 + 4 * beyond
        assert found < N_CLASSES


def test_tokens_that_share_no_byte_are_of_the_first_class_and_not_there():
    target, source = cut_at(0, 2, 4), cut_at(0, 2)
    kv = on_receiver_grid(cache_on(source), [target])
    assert classes_of(kv).tolist() == [[0, 0]]
    assert kv.present[:, 0].all(0).tolist() == [True, False]


@pytest.mark.parametrize("how", POOLINGS)
def test_it_is_pooled_with_classes_and_nothing_else(how):
    source, target = cut_at(0, 2, 4, 9), cut_at(0, 3, 9)
    kv, plain = cache_on(source), pool(cache_on(source), [target], how)
    moved = on_receiver_grid(kv, [target], how)
    contract.same(moved, plain)
    assert plain.spans[0].overlap is None
    assert moved.spans[0].overlap is not None and moved.spans[0].overlap.tolist() == [5, 5]


def test_equal_tokenizers_give_the_cache_itself_in_the_first_class():
    llama, qwen = load("llama"), load("qwen3")
    own = text_slots(capture(llama, TEXTS).kv)
    moved = on_receiver_grid(own, encode(qwen.tokenizer, TEXTS).spans)
    for one, other in zip(moved.sequences(), own.sequences(), strict=True):
        contract.same(one, other)
    assert classes_of(moved).max() == 0


def test_another_tokenizer_gives_its_tokens_and_some_of_several_classes():
    llama, gemma = load("llama"), load("gemma3")
    targets = encode(gemma.tokenizer, TEXTS).spans
    own = text_slots(capture(llama, TEXTS).kv)
    moved = on_receiver_grid(own, targets)
    assert moved.geometry == own.geometry and moved.n_tokens == len(targets[0]) != own.n_tokens
    held = torch.from_numpy(np.stack([row.role == Role.TEXT for row in targets]))
    assert torch.equal(moved.present[0], held)
    assert len(classes_of(moved)[held].unique()) > 1
    for row, alone in enumerate(own.sequences()):
        target = targets[row].take(targets[row].role == Role.TEXT)
        assert torch.equal(
            classes_of(on_receiver_grid(alone, [target]))[0],
            classes_of(list(moved.sequences())[row])[0],
        )


def test_classes_go_with_their_tokens():
    spans = replace(cut_at(0, 1, 2, 3), overlap=np.array([3, 0, 5], np.uint8))
    kv = cache_on(spans)
    assert classes_of(kv.take_tokens(torch.tensor([2, 0]))).tolist() == [[5, 3]]
    longer = cache_on(replace(cut_at(0, 1, 2, 3, 4), overlap=np.array([1, 1, 1, 1], np.uint8)))
    both = stack([kv, longer])
    assert classes_of(both).tolist() == [[0, 3, 0, 5], [1, 1, 1, 1]]
    assert classes_of(both.take_batch([1])).tolist() == [[1, 1, 1, 1]]
    assert classes_of(next(both.sequences())).tolist() == [[3, 0, 5]]


def test_the_senders_own_grid_has_no_classes():
    kv = cache_on(cut_at(0, 1, 2))
    with pytest.raises(GridMismatch, match="sender's own tokens"):
        classes_of(kv)
    one_of_each = stack([kv, cache_on(replace(cut_at(0, 1), overlap=np.zeros(1, np.uint8)))])
    with pytest.raises(GridMismatch):
        classes_of(one_of_each)


def test_what_cannot_be_pooled_is_refused():
    spans = cut_at(0, 2, 3)
    with pytest.raises(WrongKeySpace):
        on_receiver_grid(replace(cache_on(spans), space="rotated"), [spans])
    with pytest.raises(ShapeMismatch):
        on_receiver_grid(cache_on(spans), [spans, spans])
    with pytest.raises(EmptyContext):
        on_receiver_grid(contract.cache(n_tokens=0), [spans])
