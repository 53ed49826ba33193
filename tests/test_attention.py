"""What attention reads: against the models' own attention, and the two ways to say how far apart two reads are."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import contract
from architectures import ARCHITECTURES
from kvferry.errors import ShapeMismatch
from kvferry.metrics.attention import (
    Scores,
    attention_logits,
    attention_outputs,
    cosine,
    relative_error,
    softmax_seen,
    visible_slots,
)
from kvferry.metrics.likeness import attention_output_cosine, attention_reads
from kvferry.models.capture import capture, capture_rotated
from kvferry.models.scores import scores_of
from tiny import model_of, random_rows, tokens_of

SEES_ALL = torch.ones(2, 5, 7, dtype=torch.bool)
COUNTS = torch.ones(2, 5, dtype=torch.bool)


def drawn(seed=0):
    """Queries of four heads on keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_weights_are_those_of_the_model(name):
    """The mass that every slot received, by the model's own arithmetic: scale, soft cap, sinks, window, padding."""
    model = model_of(name)
    needs = "queries_rotated", "attention_mass"
    found = capture_rotated(model, tokens_of([*random_rows(1, 12), *random_rows(1, 9)]), needs)
    kv, evidence, mask = found.kv, found.evidence, found.kv.present[0]
    for layer, scores in enumerate(scores_of(model)):
        keys, _ = kv.layer(layer)
        visible = visible_slots(kv.geometry.layers[layer], mask, kv.positions[0], kv.positions[0])
        logits = attention_logits(evidence.queries_rotated[layer], keys, scores)
        weights = softmax_seen(logits, visible, scores.sinks)
        mass = (weights * mask[:, None, :, None]).sum(2).unflatten(1, (keys.shape[1], -1)).sum(2)
        torch.testing.assert_close(mass * mask.unsqueeze(1), evidence.attention_mass[layer])


def test_a_cap_that_the_model_uses_is_heard():
    assert all(scores.soft_cap == 50.0 for scores in scores_of(model_of("gemma2")))
    assert all(scores.sinks is not None for scores in scores_of(model_of("gpt_oss")))
    assert scores_of(model_of("granite"))[0].scale == 1.0


def test_content_keys_read_as_rotated_ones_do():
    model, tokens = model_of("gemma3"), tokens_of(random_rows(2, 11))
    rotated = capture_rotated(model, tokens, ("queries_rotated",))
    content, queries = capture(model, tokens).kv, rotated.evidence.queries_rotated
    reads = [attention_reads(kv, queries, kv.positions[0], scores_of(model)) for kv in (content, rotated.kv)]
    for one, other in zip(*reads, strict=True):
        torch.testing.assert_close(one, other)


def test_outputs_are_those_of_torch():
    queries, keys, values = drawn()
    want = scaled_dot_product_attention(
        queries, keys, values, SEES_ALL.unsqueeze(1), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attention_outputs(queries, keys, values, SEES_ALL, 0.3), want)


def test_a_slot_that_is_not_seen_does_not_count_and_none_at_all_reads_zero():
    queries, keys, values = drawn()
    visible = SEES_ALL.clone()
    visible[0, :, 3:], visible[1, 2] = False, False
    got = attention_outputs(queries, keys, values, visible, 1.0)
    alone = attention_outputs(queries[:1], keys[:1, :, :3], values[:1, :, :3], SEES_ALL[:1, :, :3], 1.0)
    torch.testing.assert_close(got[:1], alone)
    assert not got[1, :, 2].any()


def test_gradients_reach_keys_and_values_and_are_finite_where_nothing_is_seen():
    queries, keys, values = (part.double().requires_grad_() for part in drawn())
    visible = SEES_ALL.clone()
    visible[1, 2] = False
    how = Scores(0.5, soft_cap=2.0, sinks=torch.tensor([0.5, -1.0, 0.0, 2.0]))
    assert torch.autograd.gradcheck(
        lambda *parts: attention_outputs(*parts, visible, how), (queries, keys, values)
    )


def test_heads_that_do_not_divide_are_refused():
    queries, keys, values = drawn()
    with pytest.raises(ShapeMismatch, match="3 query heads on 2"):
        attention_outputs(queries[:, :3], keys, values, SEES_ALL, 1.0)


def test_error_and_cosine_by_head():
    want = drawn()[0]
    scaled = want * torch.tensor([1.0, 2.0, -1.0, 0.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(relative_error(scaled, want, COUNTS), torch.tensor([0.0, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(cosine(scaled, want, COUNTS), torch.tensor([1.0, 1.0, -1.0, 0.0]))
    assert relative_error(0 * want, 0 * want, COUNTS).tolist() == [0.0] * 4


def test_queries_outside_the_mask_do_not_count():
    want, mask = drawn()[0], COUNTS.clone()
    mask[:, 3] = False
    spoilt = want.clone()
    spoilt[:, :, 3] = 100.0
    torch.testing.assert_close(relative_error(spoilt, want, mask), torch.zeros(4))
    torch.testing.assert_close(cosine(spoilt, want, mask), torch.ones(4))


def test_a_cache_is_like_itself_and_like_no_shuffled_one():
    model, tokens = model_of("llama"), tokens_of(random_rows(2, 14))
    found = capture(model, tokens, ("queries_rotated",))
    kv, queries = found.kv, found.evidence.queries_rotated
    foreign = replace(capture(model, tokens_of(random_rows(2, 14))).kv, positions=kv.positions)
    mask, scores = torch.ones(2, 14, dtype=torch.bool), scores_of(model)
    same, other = (
        attention_output_cosine(kv, mapped, queries, kv.positions[0], mask, scores)
        for mapped in (kv, foreign)
    )
    assert same.attention_cosine == pytest.approx(1.0) and same.attention_error == 0.0
    assert other.attention_cosine < 0.9 and other.attention_error > 0.3
    assert [len(layer) for layer in same.cosine] == [4] * kv.geometry.n_layers


def test_two_caches_of_different_length_can_be_compared():
    own = contract.cache(n_tokens=7)
    mapped = contract.cache(n_tokens=4)
    queries = [torch.randn(1, 4, 3, 4)] * 3
    at, mask = torch.tensor([[8, 9, 10]]), torch.ones(1, 3, dtype=torch.bool)
    found = attention_output_cosine(own, mapped, queries, at, mask, [Scores(0.5)] * 3)
    assert -1 <= found.attention_cosine < 1 and found.attention_error > 0
