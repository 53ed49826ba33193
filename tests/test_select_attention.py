"""Scores by attention against the attention of real tiny models, in plain loops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from architectures import ARCHITECTURES, build
from kvferry.kv import LayerGeometry
from kvferry.metrics.attention import visible_slots
from kvferry.models.rotary import reset_call_state
from kvferry.rope import NO_ROTATION, rotate
from kvferry.select import SELECTORS
from kvferry.select.attention import looked, n_seeing, pooled, pose_last
from kvferry.select.every_kth import EveryKth
from kvferry.select.expected_attention import mean_rotation
from kvferry.select.kvcomm import context_mass, depth_prior
from kvferry.select.sensitive_layers import harm
from kvferry.select.sight import Sight
from sights import drawn, seen_by
from tiny import model_of, random_rows

MODELS = ["llama", "qwen3", "gemma2", "gemma3", "qwen2-sliding", "gpt_oss", "phi3-partial"]
N_TOKENS = 20


def attentions(name: str, row: list[int]) -> tuple[torch.Tensor, ...]:
    """Weights [queries, tokens, tokens] of each layer, as the model's own eager code says."""
    hf = build(name)
    found = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    reset_call_state(hf)
    try:
        with torch.no_grad():
            output = hf(torch.tensor([row]), output_attentions=True, use_cache=False)
    finally:
        hf.set_attn_implementation(found)
    return tuple(layer[0] for layer in output.attentions)


def scores(spec: str, sight: Sight) -> torch.Tensor:
    return SELECTORS.parse(spec).score(sight)


def seen_from(sight: Sight, layer: int, token: int) -> list[int]:
    """The queries of what was read that see a token."""
    window = sight.read.geometry.layers[layer].window
    return [n for n in range(token, sight.read.n_tokens) if window is None or n - token < window]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_last_queries_look_as_those_of_the_model_do(name):
    [row] = random_rows(1, N_TOKENS)
    [sight] = seen_by(name, [row])
    for layer, want in enumerate(attentions(name, row)):
        got = looked(pose_last(sight, layer, 5)).weights
        torch.testing.assert_close(got, want[:, -5:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_attention_received_is_the_models_own(name):
    [row] = random_rows(1, N_TOKENS)
    [sight] = seen_by(name, [row])
    mass, aware = scores("attention_mass", sight), scores("value_aware", sight)
    for layer, weights in enumerate(attentions(name, row)):
        keys, values = sight.read.layer(layer)
        shared = weights.shape[0] // keys.shape[1]
        for slot in range(sight.kv.n_tokens):
            n_queries = len(seen_from(sight, layer, slot + 1))
            by_head = weights[:, :, slot + 1].sum(1).view(-1, shared).sum(1) / n_queries
            assert mass[layer, slot].item() == pytest.approx(by_head.mean().item(), abs=1e-5)
            read = by_head * values[0, :, slot + 1].norm(dim=-1)
            assert aware[layer, slot].item() == pytest.approx(read.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_window_looks_at_what_the_model_looked_at(name):
    [row] = random_rows(1, N_TOKENS)
    [sight] = seen_by(name, [row])
    found, last = scores("snapkv(window=6, pool=3)", sight), scores("tova", sight)
    for layer, weights in enumerate(attentions(name, row)):
        mean = torch.zeros(N_TOKENS)
        for token in range(N_TOKENS):
            seen = [n for n in seen_from(sight, layer, token) if n >= N_TOKENS - 6]
            mean[token] = sum(weights[:, n, token].mean() for n in seen) / max(len(seen), 1)
        for slot in range(sight.kv.n_tokens):
            near = mean[max(slot, 1) : slot + 3]  # the token of the slot, and those beside it that are sent
            assert found[layer, slot].item() == pytest.approx(near.mean().item(), abs=1e-5)
        torch.testing.assert_close(last[layer], weights[:, -1, 1:].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen2-sliding", "phi3-partial"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_the_question_looks_at_what_the_model_looked_at(name, reduce):
    context, question = random_rows(1, N_TOKENS)[0], random_rows(1, 4)[0]
    [sight] = seen_by(name, [context], [question])
    found = scores(f"question(reduce={reduce}, per_layer=True)", sight)
    for layer, weights in enumerate(attentions(name, [*context, *question])):
        to_context = weights[:, N_TOKENS:, :N_TOKENS]
        shares = to_context / to_context.sum(-1, keepdim=True).clamp(min=1e-30)
        for slot in range(sight.kv.n_tokens):
            seen = [n - N_TOKENS for n in _sees(sight, layer, slot + 1, range(N_TOKENS, N_TOKENS + 4))]
            given = [shares[:, n, slot + 1].mean().item() for n in seen] or [0.0]
            want = max(given) if reduce == "max" else sum(given) / len(given)
            assert found[layer, slot].item() == pytest.approx(want, abs=1e-5)


def test_one_layer_that_looks_is_enough():
    [sight] = seen_by("llama", random_rows(1, N_TOKENS), random_rows(1, 4))
    each, all_alike = (scores(spec, sight) for spec in ("question(per_layer=True)", "question"))
    assert (all_alike == each.amax(0)).all()


def _sees(sight: Sight, layer: int, token: int, queries: range) -> list[int]:
    window = sight.read.geometry.layers[layer].window
    return [n for n in queries if window is None or n - token < window]


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm", "cohere", "smollm3", "llama-yarn", "gpt_oss"])
def test_expected_attention_is_that_of_the_queries_turned_by_the_mean_rotation(name):
    """Each recorded query is turned to every future position; mean and variance are those of its logits."""
    [row] = random_rows(1, N_TOKENS)
    [sight] = seen_by(name, [row])
    found = scores("expected_attention(n_future=6, sinks=3)", sight)
    length = sight.read.call_length
    for layer in range(sight.read.geometry.n_layers):
        geometry, how = sight.read.geometry.layers[layer], sight.scores[layer]
        (keys, values), queries = sight.read.layer(layer), sight.evidence.queries_content[layer][:, :, 3:]
        keys = rotate(keys, sight.read.positions, geometry.rotary, length)[0]
        each = [
            rotate(queries, torch.full((1, 1, N_TOKENS - 3), at), geometry.rotary, length)[0]
            for at in range(N_TOKENS, N_TOKENS + 6)
        ]
        turned = torch.stack(each).mean(0)
        want = torch.zeros(N_TOKENS)
        for head in range(turned.shape[0]):
            key_head = head * geometry.heads // turned.shape[0]
            logits = how.scale * turned[head] @ keys[key_head].T
            argument = logits.mean(0) + logits.var(0, unbiased=False) / 2
            ahead = [
                [_ahead(geometry, key, at) for key in range(N_TOKENS)] for at in range(N_TOKENS, N_TOKENS + 6)
            ]
            share = torch.tensor(ahead).float().mean(0)
            argument[share == 0] = -torch.inf
            rest = [] if how.sinks is None else [how.sinks[head].view(1)]
            weights = torch.cat([argument, *rest]).softmax(-1)[:N_TOKENS] * share
            want += weights * values[0, key_head].norm(dim=-1) / turned.shape[0]
        torch.testing.assert_close(found[layer], want[1:], atol=2e-5, rtol=1e-3)


def _ahead(geometry: LayerGeometry, key: int, query: int) -> bool:
    return geometry.window is None or query - key < geometry.window


def test_the_mean_rotation_is_the_mean_of_rotations():
    rotary = model_of("glm").geometry.layers[0].rotary
    rows, at = torch.randn(1, 1, 5, 8), torch.tensor([3, 4, 9])
    want = torch.stack([rotate(rows, torch.full((1, 1, 5), int(one)), rotary) for one in at]).mean(0)
    torch.testing.assert_close(rows @ mean_rotation(rotary, 8, at.view(1, 1, 3), 0), want)


@given(st.data())
def test_how_many_see_a_token_is_counted_as_the_mask_says(data):
    n_tokens = data.draw(st.integers(1, 12))
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=n_tokens, max_size=n_tokens))
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n_tokens, max_size=n_tokens)))
    window = data.draw(st.sampled_from([None, 1, 3, 5]))
    layer = LayerGeometry(1, 2, 2, NO_ROTATION, window, chunked=data.draw(st.booleans()))
    positions = torch.tensor(gaps).cumsum(0)
    seen = visible_slots(layer, present[None], positions[None], positions[None, present])[0].sum(0)
    assert n_seeing(layer, present, positions)[present].tolist() == seen[present].tolist()


def test_a_token_that_is_not_sent_gives_its_neighbours_nothing():
    sight = drawn(n_slots=4, n_head=1)
    got = pooled(sight, torch.tensor([100.0, 1.0, 2.0, 3.0, 4.0]), 3)
    assert got[1:].tolist() == pytest.approx([1.5, 2.0, 3.0, 3.5])


def test_a_slot_of_several_tokens_has_the_largest_of_their_scores():
    [sight] = seen_by("llama", random_rows(1, 9))
    pairs = torch.zeros(4, 9, dtype=torch.bool)
    for slot in range(4):
        pairs[slot, [2 * slot + 1, 2 * slot + 2]] = True
    merged = replace(sight, kv=sight.kv.take_tokens(torch.arange(4)), carried=pairs)
    for spec in ("attention_mass", "tova", "value_aware"):
        whole = scores(spec, sight)
        torch.testing.assert_close(scores(spec, merged), whole.unflatten(-1, (4, 2)).amax(-1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_context_of_the_last_queries_is_what_they_read_of_it(name):
    """Mass and harm of a layer from the model's own weights: what is left is renormalised, beside the sinks."""
    [row] = random_rows(1, N_TOKENS)
    [sight] = seen_by(name, [row])
    for layer, weights in enumerate(attentions(name, row)):
        tail = weights[:, -4:]
        assert context_mass(sight, layer, 4).item() == pytest.approx(
            tail[..., 1:-4].sum(-1).mean().item(), abs=1e-5
        )
        values = sight.read.layer(layer)[1][0].repeat_interleave(
            len(weights) // sight.read.layer(layer)[1].shape[1], 0
        )
        left = tail.clone()
        left[..., 1:-4] = 0
        left /= 1 - tail[..., 1:-4].sum(-1, keepdim=True)
        whole, without = tail @ values, left @ values
        error = (whole - without).flatten(1).norm(dim=-1) / whole.flatten(1).norm(dim=-1)
        assert harm(sight, layer, 4).item() == pytest.approx(error.mean().item(), rel=1e-3)


def test_layers_are_ranked_by_attention_and_depth():
    [sight] = seen_by("llama", random_rows(1, N_TOKENS))
    masses = [context_mass(sight, layer, 4).item() for layer in range(4)]
    shares = [(one - min(masses)) / (max(masses) - min(masses)) for one in masses]
    middle = depth_prior(4, 0.5, 0.2).tolist()
    for alpha, want in ((1.0, shares), (0.0, middle)):
        got = SELECTORS.parse(f"kvcomm(alpha={alpha}, sigma=0.2, window=4)").importance(sight)
        assert got.tolist() == pytest.approx(want, abs=1e-5)
    assert middle == pytest.approx([middle[3], middle[2], middle[1], middle[0]])


def test_every_kth_layer_thins_out_evenly():
    sight = drawn(shapes=((1, 2, 2),) * 9)
    assert EveryKth(2).wanted(sight) == [0, 8, 4, 2, 6]
    assert EveryKth(9).wanted(sight) == [0]
