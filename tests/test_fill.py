"""Zeros where nothing came: in every gap, nowhere else, and harmful."""

import pytest
import torch

from contract import cache
from kvferry.errors import UsageError
from kvferry.fuse.fill import with_zeros
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender

TEXT = "Ann has tea in Oslo. Bob has a ring in Rome. Eve has a coin in Lima."


def test_gaps_hold_zeros_and_all_others_what_came():
    present = torch.ones(3, 1, 4, dtype=torch.bool)
    present[1, 0, 2] = False
    kv = cache(n_tokens=4, present=present, positions=torch.tensor([[[0, 2, 3, 6]]]))
    filled = with_zeros(kv)
    assert filled.n_tokens == 7
    assert bool(filled.present.all())
    for layer in range(3):
        keys, own = filled.layer(layer)[0], kv.layer(layer)[0]
        assert not bool(keys[:, :, [1, 4, 5]].any())
        assert torch.equal(keys[:, :, [0, 2, 6]], own[:, :, [0, 1, 3]])
        assert torch.equal(keys[:, :, 3], own[:, :, 2] * present[layer, 0, 2])


def test_without_gaps_nothing_changes():
    kv = cache(n_tokens=5)
    assert torch.equal(with_zeros(kv).groups[0].keys, kv.groups[0].keys)


def test_two_slots_at_one_position_are_refused():
    with pytest.raises(UsageError, match="one position"):
        with_zeros(cache(n_tokens=3, positions=torch.tensor([[[0, 1, 1]]])))


def test_a_receiver_attends_to_zeros_only_if_told_to():
    sender = Sender("llama", "raw", select="knorm(keep=high, proportion=0.4)")
    whole, part = Sender("llama", "raw").read(TEXT), sender.read(TEXT)
    absent, zeros = Receiver("llama"), Receiver("llama", fill="zeros")
    question = "Where is the tea?"
    assert zeros.answer(whole, question).text == absent.answer(whole, question).text == "Oslo"
    _, masked, _ = absent.take_in([part.frame], [question])
    _, attended, _ = zeros.take_in([part.frame], [question])
    assert not torch.allclose(masked, attended, atol=1e-2)
