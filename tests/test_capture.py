"""Capture against the caches and hidden states that transformers itself returns."""

import pytest
import torch
from transformers import DynamicCache

from architectures import ARCHITECTURES
from kvferry.errors import ContextTooLong, EmptyContext, UnknownName
from kvferry.models.capture import _capture, capture, capture_rotated
from kvferry.models.load import load
from kvferry.models.rotary import reset_call_state
from kvferry.rope import rotate
from tiny import model_of, random_rows, tokens_of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rotated_capture_is_the_models_own_cache(name):
    model, rows = model_of(name), random_rows(2, 20)
    reset_call_state(model.hf)
    cache = model.hf(torch.tensor(rows), past_key_values=DynamicCache(), use_cache=True).past_key_values
    kv = capture_rotated(model, tokens_of(rows)).kv
    for layer in range(model.geometry.n_layers):
        keys, values = kv.layer(layer)
        assert (keys - cache.layers[layer].keys).abs().max() < 1e-5
        assert (values - cache.layers[layer].values).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm"])
def test_left_padded_batch_equals_single(name):
    model, rows = model_of(name), random_rows(3, 20)
    rows = [rows[0], rows[1][:13], rows[2][:1]]
    batch = capture(model, tokens_of(rows)).kv
    for row, alone in zip(rows, batch.sequences(), strict=True):
        single = capture(model, tokens_of([row])).kv
        assert torch.equal(alone.positions, single.positions)
        for layer in range(model.geometry.n_layers):
            for got, want in zip(alone.layer(layer), single.layer(layer), strict=True):
                assert (got - want).abs().max() < 1e-5


def test_evidence_is_what_was_asked_for_and_nothing_else():
    model, tokens = model_of("llama"), tokens_of(random_rows(1, 9))
    evidence = capture(model, tokens, needs=["hidden_states"]).evidence
    assert len(evidence.hidden_states) == 4
    assert evidence.queries_content == evidence.queries_rotated == evidence.attention_mass == ()
    embedded = model.hf.get_input_embeddings()(tokens.ids)
    assert torch.equal(evidence.hidden_states[0], embedded)


def test_unknown_evidence_is_named():
    """Past the type checker, as a caller without one would come."""
    with pytest.raises(UnknownName, match="attention_mass"):
        _capture(model_of("llama"), tokens_of(random_rows(1, 3)), ["atention_mass"], 0, "content")


@pytest.mark.parametrize("name", ["llama", "phi3-partial", "cohere", "smollm3"])
def test_queries_before_rotation_rotate_to_those_after(name):
    model, tokens = model_of(name), tokens_of(random_rows(2, 12))
    captured = capture(model, tokens, needs=["queries_content", "queries_rotated"])
    for layer, (content, rotated) in enumerate(
        zip(captured.evidence.queries_content, captured.evidence.queries_rotated, strict=True)
    ):
        again = rotate(content, captured.kv.positions, model.geometry.layers[layer].rotary, 12)
        assert (again - rotated).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_mass_counts_every_query_once(name):
    model, rows = model_of(name), random_rows(2, 11)
    rows[1] = rows[1][:6]
    mass = capture(model, tokens_of(rows), needs=["attention_mass"]).evidence.attention_mass
    for layer in mass:
        per_sequence = layer.sum((1, 2))  # each query of each of 4 heads spends a mass of one
        assert torch.allclose(per_sequence, torch.tensor([44.0, 24.0]), atol=1e-4)
        assert layer[1, :, :5].abs().max() == 0


def test_a_part_is_read_as_in_the_longer_call():
    model, rows = model_of("phi3-longrope"), random_rows(1, 40)
    whole = capture(model, tokens_of(rows)).kv
    part, alone = (capture(model, tokens_of([rows[0][:20]]), call_length=length).kv for length in (40, 0))
    last = model.geometry.n_layers - 1
    want = whole.layer(last)[1][:, :, :20]
    assert (part.layer(last)[1] - want).abs().max() < 1e-5
    assert (alone.layer(last)[1] - want).abs().max() > 1e-3, "the rule for long calls should matter here"


def test_the_model_is_left_as_found_even_after_an_error():
    model = model_of("llama")
    config = model.hf.config
    found = config._attn_implementation
    with pytest.raises(ContextTooLong, match=r"65 tokens.*64 positions"):
        capture(model, tokens_of(random_rows(1, 65)))
    with pytest.raises(IndexError):
        capture(model, tokens_of([[10_000]]))
    assert config._attn_implementation == found


def test_empty_context_is_refused():
    with pytest.raises(EmptyContext, match="context 1"):
        capture(load("llama"), ["Ann has tea.", "  "])
