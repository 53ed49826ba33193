"""SemanticIndexer: the attention of the layer's own queries, at most so many slots, in their order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract import check_spec
from kvferry.errors import BadSpec, NotFinite, UsageError
from kvferry.rope import rotate
from kvferry.select import SELECTORS
from kvferry.select.sight import Sight, alone
from sights import drawn, seen_by
from tiny import random_rows


def kept(sight: Sight, spec: str) -> list[int]:
    plan = SELECTORS.parse(spec).plan(sight)
    return plan.classes.any(0).any(0).nonzero().flatten().tolist()


def by_loop(sight: Sight, layer: int, window: int) -> torch.Tensor:
    """softmax(QK'/sqrt(d)) query by query and head by head; the mean over the queries that see a token."""
    geometry, read = sight.read.geometry.layers[layer], sight.read
    keys = rotate(read.layer(layer)[0], read.positions, geometry.rotary)[0]
    queries = rotate(sight.evidence.queries_content[layer], read.positions, geometry.rotary)[0]
    n_heads, n_tokens = queries.shape[:2]
    total, seen_by_n = torch.zeros(n_tokens), torch.zeros(n_tokens)
    for t in range(n_tokens - window, n_tokens):
        first = 0 if geometry.window is None else max(0, t - geometry.window + 1)
        for head in range(n_heads):
            shared = keys[head * len(keys) // n_heads]
            logits = [
                queries[head, t].dot(shared[s]).item() * sight.scores[layer].scale
                for s in range(first, t + 1)
            ]
            total[first : t + 1] += torch.tensor(logits).softmax(0) / n_heads
        seen_by_n[first : t + 1] += 1
    return (total / seen_by_n.clamp(min=1))[sight.carried.int().argmax(-1)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize("window", [1, 4])
def test_it_keeps_what_the_layers_own_queries_attend_to(name: str, window: int):
    [sight] = seen_by(name, random_rows(1, 18))
    spec = f"semantic_indexer(top_k=5, window={window}, per_layer=True)"
    selector = SELECTORS.parse(spec)
    plan, scores = selector.plan(sight), selector.score(sight)
    for layer in range(sight.read.geometry.n_layers):
        want = by_loop(sight, layer, window)
        torch.testing.assert_close(scores[layer], want, atol=2e-5, rtol=1e-4)
        chosen = plan.classes[layer, 0].nonzero().flatten().tolist()
        assert chosen == sorted(want.topk(5).indices.tolist())


@given(n_slots=st.integers(1, 12), top_k=st.integers(1, 20), proportion=st.floats(0.05, 1.0))
def test_at_most_so_many_slots(n_slots: int, top_k: int, proportion: float):
    spec = f"semantic_indexer(top_k={top_k}, proportion={proportion!r})"
    assert len(kept(drawn(n_slots), spec)) == min(top_k, math.ceil(proportion * n_slots - 1e-9), n_slots)


def test_more_than_there_are_is_all_of_them():
    assert kept(drawn(6), "semantic_indexer(top_k=1000)") == list(range(6))


def test_sinks_stay():
    assert kept(drawn(9), "semantic_indexer(top_k=3, sinks=3)") == [0, 1, 2]


def test_padding_is_looked_at_by_nobody():
    rows = [*random_rows(1, 9), *random_rows(1, 18)]
    padded, alone_read = seen_by("llama", rows)[0], seen_by("llama", rows[:1])[0]
    selector = SELECTORS.parse("semantic_indexer(top_k=4, window=3)")
    torch.testing.assert_close(selector.score(padded), selector.score(alone_read), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", ["top_k=0", "window=0", "top_k=-3"])
def test_an_impossible_option_is_refused(options: str):
    with pytest.raises(BadSpec):
        SELECTORS.parse(f"semantic_indexer({options})")


def test_queries_are_needed():
    with pytest.raises(UsageError, match="queries_content"):
        SELECTORS.parse("semantic_indexer").plan(alone(drawn(5).kv))


def test_queries_that_are_no_numbers_are_refused():
    sight = drawn(7)
    sight.evidence.queries_content[1][0, 0, -1, 0] = float("nan")
    with pytest.raises(NotFinite, match="layer 1"):
        SELECTORS.parse("semantic_indexer(top_k=2)").plan(sight)


def test_it_is_its_spec():
    check_spec(SELECTORS, SELECTORS.parse("semantic_indexer(top_k=7, window=2, sinks=1)"))
    check_spec(SELECTORS, SELECTORS.parse("lightning(indexer='a/b', window=2)"))
