"""The controls without context: means of entries by token text, and the mean of all, computed by hand beside them."""

from collections import defaultdict

import pytest
import torch

import contract
from kvferry.align.contract import Contract
from kvferry.align.features import flatten
from kvferry.align.mean_only import MeanOnly
from kvferry.align.ridge import Sums
from kvferry.align.token_means import PRIOR, TokenMeans
from kvferry.align.token_table import TokenTable, first_layer
from kvferry.codec import CODECS, roundtrip
from kvferry.models.load import load
from kvferry.train.paired import collect, targets, token_texts
from kvferry.train.route import Route

SENDER = contract.geometry(((1, 2, 1), (1, 2, 1)))
RECEIVER = contract.geometry(((1, 1, 1),), model="ef")
TEXTS = ["Ann has tea in Oslo. Ben has tea in Rome.", "Ben met Ann in Oslo."]


def means() -> TokenMeans:
    """The token "a" three times, "b" once, in two calls."""
    found = TokenMeans()
    found.add([b"a", b"b"], torch.tensor([[1.0, 0, 0], [0, 6, 0]]), torch.tensor([[1.0, 10], [3, 30]]))
    found.add([b"a", b"a"], torch.tensor([[3.0, 0, 0], [2, 0, 3]]), torch.tensor([[4.0, 40], [4, 40]]))
    return found


def test_means_by_hand():
    found = means()
    assert len(found) == 2 and found.index == {b"a": 0, b"b": 1}
    assert found.counts.tolist() == [[3], [1]]
    assert found.marks.tolist() == [[6, 0, 3], [0, 6, 0]]
    assert found.entries.tolist() == [[9, 90], [3, 30]]
    assert found.entries.dtype == torch.float64


def test_a_rare_token_is_drawn_to_the_mean_of_all():
    """Four tokens sum to 12 and 120: the mean is 3 and 30; it stands as one token more behind each entry."""
    (row,) = means().entries_of([[b"a", b"b", b"never"]])
    assert PRIOR == 1.0
    assert row.tolist() == [[3.0, 30.0], [3.0, 30.0], [3.0, 30.0]]
    skewed = TokenMeans()
    skewed.add([b"a"] * 3 + [b"b"], torch.zeros(4, 3), torch.tensor([[0.0], [0], [0], [8]]))
    assert skewed.entries_of([[b"b", b"a", b"c"]])[0].tolist() == [[5.0], [0.5], [2.0]]


def test_no_texts_change_nothing():
    found = means()
    found.add([], torch.zeros(0, 3), torch.zeros(0, 2))
    assert found.counts.tolist() == [[3], [1]] and found.entries.tolist() == [[9, 90], [3, 30]]


def test_the_table_looks_up_the_nearest_mark():
    table = TokenTable(Contract(SENDER, RECEIVER), n_tokens=2)
    table.solve_from(means())
    assert table.marks.tolist() == [[2, 0, 1], [0, 6, 0]]
    kv = contract.cache(((1, 2, 1), (1, 2, 1)), n_tokens=3)
    for part, numbers in zip(kv.layer(0), ([[2.2, 0.1], [0, 5], [1, 1]], [[1], [0], [0]]), strict=True):
        part[0, 0].copy_(torch.tensor(numbers, dtype=torch.float32))
    got = flatten(table(kv))[0]
    assert torch.equal(got, table.entries[[0, 1, 0]])
    assert table.options() == {"n_tokens": 2}


def test_first_layer_entries_depend_on_the_token_alone():
    """What the table lives on: no context reaches the first layer's keys and values without their rotation."""
    route = Route(load("llama"), load("llama"))
    sent = route.sent(TEXTS)
    seen = defaultdict(list)
    for row, texts in enumerate(token_texts(sent, TEXTS)):
        for token, text in enumerate(texts):
            if sent.present[0, row, token]:
                seen[text].append(first_layer(sent)[row, token])
    assert max(map(len, seen.values())) > 2
    for entries in seen.values():
        assert all(torch.allclose(entries[0], other, atol=1e-4) for other in entries)


@pytest.mark.parametrize("grid", ["sender", "receiver"])
def test_collected_means_are_those_of_the_pairs(grid):
    """Straight from the definition, token by token, on either grid."""
    route = Route(load("llama"), load("gemma3"), grid)
    pairs = collect(route, TEXTS, [lambda kv: kv], batch_size=1)
    by_text = defaultdict(list)
    for text in TEXTS:
        sent, held = route.sent([text]), route.held([text])
        entries, paired = targets(sent, held)
        for token, piece in enumerate(token_texts(sent, [text])[0]):
            if paired[0, token]:
                by_text[piece].append((first_layer(sent)[0, token], entries[0, token]))
    assert set(pairs.tokens.index) == set(by_text)
    for piece, index in pairs.tokens.index.items():
        marks, entries = (torch.stack(part).double() for part in zip(*by_text[piece], strict=True))
        assert pairs.tokens.counts[index] == len(marks)
        assert torch.allclose(pairs.tokens.marks[index] / len(marks), marks.mean(0), atol=1e-5)
        assert torch.allclose(pairs.tokens.entries[index] / len(marks), entries.mean(0), atol=1e-5)


@pytest.mark.parametrize("spec", ["int(bits=8)", "int(bits=4)", "ecsq"])
def test_tokens_are_recognised_behind_a_codec(spec):
    route = Route(load("llama"), load("gemma3"))
    pairs = collect(route, TEXTS, [lambda kv: kv])
    table = TokenTable(Contract(route.sender.geometry, route.receiver.geometry), len(pairs.tokens))
    table.solve_from(pairs.tokens)
    sent = route.sent(TEXTS)
    clean, coded = (flatten(table(kv))[sent.present[0]] for kv in (sent, roundtrip(CODECS.parse(spec), sent)))
    assert torch.equal(clean, coded)
    table.require_codec("int(bits=2)")


def test_the_mean_entry_is_the_mean():
    x, y = torch.randn(50, 6), torch.randn(50, 2) + 3
    mean = MeanOnly(Contract(SENDER, RECEIVER))
    mean.solve_from(Sums.of(x[:20], y[:20]) + Sums.of(x[20:], y[20:]))
    assert torch.allclose(mean.mean, y.mean(0), atol=1e-6)
    kv = contract.cache(((1, 2, 1), (1, 2, 1)), n_tokens=4)
    assert torch.equal(flatten(mean(kv))[0], mean.mean.expand(4, -1))
