"""The owner of positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import UsageError
from kvferry.fuse.layout import relay_layout, text_slots
from kvferry.kv import Role
from kvferry.models.capture import capture
from kvferry.models.tokens import join, pad, plain_spans
from tiny import model_of, random_rows, tokens_of


def captured(lengths, n_head=2):
    rows = random_rows(len(lengths), max(lengths))
    head = pad([([1] * n_head, plain_spans(n_head, Role.SPECIAL)) for _ in lengths])
    body = tokens_of([row[:n] for row, n in zip(rows, lengths, strict=True)])
    return capture(model_of("llama"), join(head, body)).kv


def test_text_slots_drop_the_head_and_count_from_the_first_text_token():
    kv = text_slots(captured([5, 3]))
    assert kv.n_tokens == 5 and kv.present[0].sum(-1).tolist() == [5, 3]
    assert kv.positions[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert kv.positions[0, 1][kv.present[0, 1]].tolist() == [0, 1, 2]


def test_with_one_tokenizer_slots_stand_where_own_tokens_would():
    kv = text_slots(captured([5, 3]))
    layout = relay_layout(kv, n_head=4)
    assert layout.positions[0].tolist() == [4, 5, 6, 7, 8]
    assert layout.next_position.tolist() == [9, 7]


def test_a_dropped_token_leaves_its_gap():
    kv = text_slots(captured([6])).take_tokens(torch.tensor([0, 1, 4, 5]))
    assert relay_layout(kv, n_head=1).positions[0].tolist() == [1, 2, 5, 6]


@given(stride=st.floats(0.05, 20), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_slots_never_run_backwards_nor_into_the_question(stride, lengths):
    kv = text_slots(captured(lengths))
    layout = relay_layout(kv, 3, stride)
    for row in range(len(lengths)):
        used = layout.positions[row][kv.present[0, row]]
        assert used[0] == 3 and (used.diff() >= 0).all()
        assert used[-1] < layout.next_position[row]


@pytest.mark.parametrize("stride", [0.0, -1.0, float("nan"), float("inf")])
def test_strides_must_be_positive(stride):
    with pytest.raises(UsageError, match="stride"):
        relay_layout(text_slots(captured([2])), 1, stride)
