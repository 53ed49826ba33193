"""Injection is exact: what a model reads from an injected cache is what it would have read itself.

The oracles are transformers' own forward passes, with masks handed to them where slots are missing.
"""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from architectures import ARCHITECTURES, WINDOW
from kvferry.errors import ContextTooLong, ForeignModel, ShapeMismatch, UsageError
from kvferry.kv import KV
from kvferry.models.capture import capture, capture_rotated
from kvferry.models.load import Model
from kvferry.models.rotary import reset_call_state
from kvferry.models.state import State, empty, generate_inputs, inject, read, read_at
from tiny import model_of, random_rows, tokens_of

PREFIX, TOTAL, STEPS = 24, 34, 5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("take", [capture, capture_rotated])
def test_own_cache_gives_plain_inference_at_the_prompt_and_at_every_step(name, take):
    model, rows = model_of(name), random_rows(2, TOTAL + STEPS)
    state = _injected(
        model, take(model, tokens_of([row[:PREFIX] for row in rows]), call_length=TOTAL).kv, TOTAL
    )
    plain, cache = _plain(model, [row[:TOTAL] for row in rows], None)
    got = read(state, tokens_of([row[PREFIX:TOTAL] for row in rows]), keep=0)
    assert (got - plain[:, PREFIX:]).abs().max() <= 1e-5
    for step in range(TOTAL, TOTAL + STEPS):
        new = [[row[step]] for row in rows]
        plain, cache = _plain(model, new, cache)
        assert (read(state, tokens_of(new)) - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_padded_batch_equals_single_sequences(name):
    model, rows = model_of(name), random_rows(2, TOTAL)
    prefixes, rest = [rows[0][:PREFIX], rows[1][:9]], [rows[0][PREFIX:], rows[1][9:14]]
    kv = capture(model, tokens_of(prefixes)).kv
    together = read(_injected(model, kv), tokens_of(rest))
    for row, (prefix, after) in enumerate(zip(prefixes, rest, strict=True)):
        alone = _injected(model, capture(model, tokens_of([prefix])).kv)
        assert (read(alone, tokens_of([after])) - together[row]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "smollm3"])
def test_a_hole_equals_the_slots_deletion(name):
    model, rows = model_of(name), random_rows(1, TOTAL)
    kv = capture(model, tokens_of([rows[0][:PREFIX]])).kv
    kept = torch.tensor([i for i in range(PREFIX) if i not in (3, 20)])
    masked = _injected(model, _without(kv, layers=range(4), tokens=(3, 20)))
    deleted = _injected(model, kv.take_tokens(kept))
    after = tokens_of([rows[0][PREFIX:]])
    assert (read(masked, after, keep=0) - read(deleted, after, keep=0)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3)])
def test_a_token_missing_in_some_layers_equals_a_forward_with_their_masks(name, layers):
    model, rows = model_of(name), random_rows(1, TOTAL)
    kv = capture(model, tokens_of([rows[0][:PREFIX]])).kv
    state = _injected(model, _without(kv, layers, tokens=(5, 22)))
    got = read(state, tokens_of([rows[0][PREFIX:]]), keep=0)
    plain = _plain(model, [rows[0]], None)[0][:, PREFIX:]
    want = _forward_with_masked_layers(model, rows[0], layers, (5, 22))
    assert (got - want).abs().max() <= 1e-5
    assert (got - plain).abs().max() > 1e-4, "the missing token should matter"


def test_a_token_outside_the_window_need_not_be_sent():
    model, rows = model_of("gemma3"), random_rows(1, TOTAL)
    sliding = [i for i, layer in enumerate(model.geometry.layers) if layer.window == WINDOW]
    kv = capture(model, tokens_of([rows[0][:PREFIX]])).kv
    unseen, seen = range(PREFIX - WINDOW + 1), (PREFIX - WINDOW + 1,)
    after = tokens_of([rows[0][PREFIX:]])
    whole = read(_injected(model, kv), after, keep=0)
    assert torch.equal(read(_injected(model, _without(kv, sliding, unseen)), after, keep=0), whole)
    assert not torch.equal(read(_injected(model, _without(kv, sliding, seen)), after, keep=0), whole)


def test_absent_slots_may_hold_anything():
    model, rows = model_of("llama"), random_rows(1, PREFIX + 3)
    kv = capture(model, tokens_of([rows[0][:PREFIX]])).kv
    clean = _without(kv, range(4), (2,))
    for group in kv.groups:
        group.keys[:, :, :, 2], group.values[:, :, :, 2] = torch.nan, torch.inf
    after = tokens_of([rows[0][PREFIX:]])
    assert read(_injected(model, clean), after).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "llama-yarn"])
def test_only_relative_positions_matter(name):
    model, rows = model_of(name), random_rows(1, TOTAL)
    kv = capture(model, tokens_of([rows[0][:PREFIX]])).kv
    after, moved = tokens_of([rows[0][PREFIX:]]), empty(model)
    inject(moved, kv, kv.positions[0] + 11, torch.tensor([PREFIX + 11]))
    shifted = empty(model)
    inject(shifted, kv, kv.positions[0] + 11, torch.tensor([PREFIX + 10]))
    want = read(_injected(model, kv), after)
    assert (read(moved, after) - want).abs().max() < 1e-4
    assert (read(shifted, after) - want).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "llama-dynamic", "smollm3"])
def test_slots_may_come_before_the_head(name):
    """Head and question in one pass behind the slots equal head, slots, question one after the other."""
    model, rows = model_of(name), random_rows(2, TOTAL)
    head, after = ([row[a:b] for row in rows] for a, b in ((0, 3), (PREFIX, TOTAL)))
    kv = capture(model, tokens_of([row[:PREFIX] for row in rows]), call_length=TOTAL).kv
    slots = kv.take_tokens(torch.arange(3, PREFIX))
    plain = empty(model, 2, call_length=TOTAL)
    read(plain, tokens_of(head))
    inject(plain, slots, slots.positions[0], torch.tensor([PREFIX, PREFIX]))
    want = read(plain, tokens_of(after), keep=0)
    state = empty(model, 2, call_length=TOTAL)
    inject(state, slots, slots.positions[0], torch.tensor([PREFIX, PREFIX]))
    both = tokens_of([a + b for a, b in zip(head, after, strict=True)])
    positions = torch.cat([torch.arange(3), torch.arange(PREFIX, TOTAL)]).expand(2, -1)
    got = read_at(state, both, positions, keep=0)[:, 3:]
    assert (got - want).abs().max() <= 1e-5
    assert torch.equal(state.next_position, plain.next_position)
    new = tokens_of([[7], [8]])
    assert (read(state, new) - read(plain, new)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi3"])
def test_transformers_can_generate_from_an_injected_state(name):
    model, rows = model_of(name), random_rows(2, TOTAL)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.hf.generate(torch.tensor(rows), attention_mask=torch.ones(2, TOTAL).long(), **options)
    state = _injected(model, capture(model, tokens_of([row[:PREFIX] for row in rows])).kv)
    inputs = generate_inputs(state, tokens_of([row[PREFIX:] for row in rows]))
    got = model.hf.generate(**inputs, **options)
    assert torch.equal(got[:, -6:], want[:, -6:])


def test_what_transformers_cannot_mask_is_refused():
    model, rows = model_of("gemma3"), random_rows(1, PREFIX)
    kv = capture(model, tokens_of(rows)).kv
    for broken in (_without(kv, (1,), (3,)), _without(kv, range(4), (3,))):
        with pytest.raises(UsageError, match="cannot mask"):
            generate_inputs(_injected(model, broken), tokens_of([[5]]))


def test_a_foreign_cache_is_refused():
    kv = capture(model_of("llama"), tokens_of(random_rows(1, 4))).kv
    with pytest.raises(ForeignModel):
        _injected(model_of("qwen2"), kv)


def test_rotated_keys_cannot_be_moved():
    model = model_of("llama")
    kv = capture_rotated(model, tokens_of(random_rows(1, 4))).kv
    with pytest.raises(ShapeMismatch, match="rotated keys"):
        inject(empty(model), kv, kv.positions[0] + 1, torch.tensor([5]))


def test_positions_run_out_with_a_clear_error():
    model = model_of("llama")
    state = _injected(model, capture(model, tokens_of(random_rows(1, 60))).kv)
    with pytest.raises(ContextTooLong, match=r"65 positions are needed.*64"):
        read(state, tokens_of([[3, 4, 5, 6, 7]]))


def _injected(model: Model, kv: KV, call_length: int = 0) -> State:
    state = empty(model, kv.n_batch, call_length=call_length)
    inject(state, kv, kv.positions[0], kv.positions[0].amax(-1) + 1)
    return state


def _without(kv: KV, layers, tokens) -> KV:
    present = kv.present.clone()
    for layer in layers:
        present[layer, :, list(tokens)] = False
    return replace(kv, present=present)


def _plain(model: Model, rows: list[list[int]], cache: DynamicCache | None):
    if cache is None:
        reset_call_state(model.hf)
    with torch.no_grad():
        output = model.hf(torch.tensor(rows), past_key_values=cache, use_cache=True)
    return output.logits, output.past_key_values


def _forward_with_masked_layers(model: Model, ids: list[int], layers, tokens) -> torch.Tensor:
    """The whole sequence in one eager pass; in `layers`, queries after the prefix do not see `tokens`."""
    hf = model.hf
    found = hf.config._attn_implementation
    hf.set_attn_implementation("eager")

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., PREFIX:, list(tokens)] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    attention = [
        m for m in hf.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    ]
    hooks = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in attention if m.layer_idx in layers]
    try:
        with torch.no_grad():
            return hf(torch.tensor([ids])).logits[:, PREFIX:]
    finally:
        for hook in hooks:
            hook.remove()
        hf.set_attn_implementation(found)
