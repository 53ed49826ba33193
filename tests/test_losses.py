"""Losses between caches: by hand, by gradient, under masks, against torch's attention, and what fools them."""

import importlib
import inspect
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import kvferry.train.losses
from contract import ORDINARY, RAGGED, cache, check_spec, geometry
from kvferry.errors import BadSpec, ShapeMismatch, UnknownName, UsageError, WrongKeySpace
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Group
from kvferry.metrics.attention import Scores
from kvferry.metrics.attention_distance import Slots, attention_kl, attention_output_error
from kvferry.metrics.centred import (
    centred_cosine,
    centred_r2,
    mean_vector_cosine,
    other_token_cosine,
    plain_cosine,
)
from kvferry.models.capture import capture, capture_rotated
from kvferry.models.load import load
from kvferry.models.relay import take_over
from kvferry.models.scores import scores_of
from kvferry.train.answer_loss import answer_scores, continuations, full_text_kl, full_text_logits
from kvferry.train.examples import Worlds
from kvferry.train.losses import LOSSES
from kvferry.train.losses.base import Aids, KVLoss, Reads, over_cache
from kvferry.train.losses.cosine import CosineLoss
from kvferry.train.losses.hybrid import HybridKVLoss
from kvferry.train.losses.mercator import MercatorKVLoss
from kvferry.train.losses.moments import Moments, moments_of
from kvferry.train.losses.structural import StructuralKVLoss
from kvferry.train.losses.three_term import ThreeTermLoss
from kvferry.train.losses.whitened_mse import WhitenedMSE
from tiny import model_of, random_rows, tokens_of

SPECS = [
    "cosine",
    "cosine(whiten=head)",
    "hybrid",
    "hybrid(mercator_weight=0.5, mse_weight=0.25, beta=0.1, whiten=none)",
    "mercator",
    "mercator(alpha=0.5, beta=1.0, epsilon=1e-6, whiten=channel)",
    "structural",
    "structural(alpha_output=0.0, alpha_attn=2.0)",
    "three_term",
    "three_term(lambda_cosine=0.0, lambda_task=0.0, whiten=head)",
    "whitened_mse",
    "whitened_mse(head)",
    "whitened_mse(none)",
]


def task(kv: KV) -> torch.Tensor:
    """Smooth, and zero nowhere in particular; it looks only at what is present."""
    keys, values = kv.layer(1)
    held = kv.present[1][:, None, :, None]
    return sum(part.masked_fill(~held, 0.0).sin().sum() for part in (keys, values))


def aids_for(target: KV, n_new=3, seed=5) -> Aids:
    """Moments of the target, and random queries that stand among its last tokens and behind them."""
    generator = torch.Generator().manual_seed(seed)
    layers = target.geometry.layers
    queries = tuple(
        torch.randn(target.n_batch, 2 * layer.heads, n_new, layer.key_dim, generator=generator)
        for layer in layers
    )
    positions = (torch.arange(n_new) + target.n_tokens - 2).expand(target.n_batch, -1)
    mask = torch.ones(target.n_batch, n_new, dtype=torch.bool)
    mask[0, 0] = False
    moments = moments_of([replace(target, space="content")])
    return Aids(moments, Reads(queries, positions, mask, (Scores(0.5),) * len(layers)), task)


def holes(n_layers, n_batch, n_tokens, share, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_layers, n_batch, n_tokens, generator=generator) >= share


def parts_of(kv: KV) -> list[torch.Tensor]:
    return [part for group in kv.groups for part in (group.keys, group.values)]


def rebuilt(kv: KV, parts) -> KV:
    pairs = zip(kv.groups, parts[::2], parts[1::2], strict=True)
    return kv.with_groups(tuple(Group(group.layers, keys, values) for group, keys, values in pairs))


def leaves(kv: KV) -> tuple[KV, list[torch.Tensor]]:
    """The same cache on tensors that take a gradient."""
    parts = [part.clone().requires_grad_() for part in parts_of(kv)]
    return rebuilt(kv, parts), parts


def space_of(loss: KVLoss) -> str:
    return "rotated" if loss.name == "structural" else "content"


def pair(loss: KVLoss, shapes=RAGGED, n_tokens=5, n_batch=2, share=0.3, seed=0) -> tuple[KV, KV]:
    """Two different caches that lack some of the same slots and some of their own."""
    size = (len(shapes), n_batch, n_tokens)
    fields = {"n_tokens": n_tokens, "n_batch": n_batch, "space": space_of(loss)}
    both = holes(*size, share, seed)
    predicted = cache(shapes, present=both & holes(*size, share, seed + 1), seed=seed, **fields)
    return predicted, cache(shapes, present=both & holes(*size, share, seed + 2), seed=seed + 1, **fields)


# What a loss is


@pytest.mark.parametrize("spec", [*SPECS, "hybrid(schedule=linear, steps=10)", "hybrid(schedule=cosine)"])
def test_a_loss_is_its_spec(spec):
    check_spec(LOSSES, LOSSES.parse(spec))


def test_every_loss_on_disk_is_in_the_table():
    folder = Path(kvferry.train.losses.__file__).parent
    modules = [importlib.import_module(f"kvferry.train.losses.{path.stem}") for path in folder.glob("*.py")]
    written = {
        found
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found) and issubclass(found, KVLoss) and not inspect.isabstract(found)
    }
    assert written == {LOSSES.get(name) for name in LOSSES.names()}
    assert {LOSSES.parse(spec).name for spec in SPECS} == set(LOSSES.names())


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("mercator(alpha=-1.0)", BadSpec),
        ("mercator(epsilon=0.0)", BadSpec),
        ("hybrid(steps=0)", BadSpec),
        ("hybrid(schedule=step)", BadSpec),
        ("structural(alpha_attn=-0.5)", BadSpec),
        ("three_term(lambda_task=-1.0)", BadSpec),
        ("whitened_mse(whiten=layer)", BadSpec),
        ("mercator(alfa=1.0)", UnknownName),
        ("mercater", UnknownName),
    ],
)
def test_what_is_no_loss_is_refused(spec, error):
    with pytest.raises(error):
        LOSSES.parse(spec)


# By hand


def one(*numbers) -> torch.Tensor:
    """A single vector as a layer of one head and one token."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, 1, -1)


HELD = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("spec", "predicted", "target", "want"),
    [
        # A hundred times as long: no error of direction, and ln(100) ** 2 of length.
        ("mercator(beta=0.0)", (100, 200), (1, 2), 0.0),
        ("mercator", (100, 200), (1, 2), 0.01 * math.log(100) ** 2),
        ("whitened_mse(none)", (100, 200), (1, 2), (99**2 + 198**2) / 2),
        # Orthogonal: one in the mean over channels, two in their sum.
        ("mercator", (1, 0), (0, 1), 1.0),
        ("cosine", (1, 0), (0, 1), 1.0),
        ("whitened_mse(none)", (1, 0), (0, 1), 1.0),
        ("cosine", (1, 0), (-3, 0), 2.0),
        ("hybrid(whiten=none)", (1, 0), (0, 1), 0.8 + 0.2),
        ("three_term(lambda_task=0.0, whiten=none)", (1, 0), (0, 1), 1.0 + 0.5),
        # A vector of no length has no direction; two of them agree.
        ("cosine", (0, 0), (0, 0), 0.0),
        ("cosine", (0, 0), (0, 1), 0.5),
    ],
)
def test_numbers_worked_out_by_hand(spec, predicted, target, want):
    loss, _ = LOSSES.parse(spec)(one(*predicted), one(*target), HELD)
    assert loss.item() == pytest.approx(want, rel=1e-4, abs=1e-9)


def test_an_error_counts_in_units_of_its_channel_or_head():
    moments = Moments(torch.tensor([[7.0, -7.0]]), torch.tensor([[4.0, 12.0]]))
    predicted, target = one(2, 0), one(0, 6)
    assert WhitenedMSE()(predicted, target, HELD, moments)[0].item() == pytest.approx((4 / 4 + 36 / 12) / 2)
    assert WhitenedMSE("head")(predicted, target, HELD, moments)[0].item() == pytest.approx((4 + 36) / 2 / 8)


def test_directions_are_seen_from_the_mean():
    moments = Moments(torch.tensor([[10.0, 0.0]]), torch.ones(1, 2))
    predicted, target = one(10, 1), one(10, -1)
    assert CosineLoss()(predicted, target, HELD)[0] < 0.03
    assert CosineLoss(whiten="channel")(predicted, target, HELD, moments)[0].item() == pytest.approx(2.0)


def test_constant_channels_and_heads_divide_nothing_by_zero():
    moments = Moments(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    predicted = torch.ones(1, 2, 1, 2)
    for how in ("head", "channel"):
        assert moments.whiten(predicted, how).isfinite().all()
    assert moments.whiten(predicted, "channel")[0, 1, 0].tolist() == [1.0, 1.0]


def test_mercator_tells_what_the_seed_tells():
    loss, told = MercatorKVLoss()(torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4), torch.ones(2, 3).bool())
    assert {"cos_sim", "dir_loss", "mag_loss"} <= told.keys()
    torch.testing.assert_close(told["dir_loss"], 1 - told["cos_sim"])
    torch.testing.assert_close(loss, told["dir_loss"] + 0.01 * told["mag_loss"])


# Properties of all


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_lost_between_equal_caches_and_nothing_pulls(spec):
    loss = LOSSES.parse(spec)
    target = pair(loss)[1]
    aids = replace(aids_for(target), task=lambda kv: (kv.layer(0)[0] * 0.0).sum())
    predicted, parts = leaves(target)
    value, told = over_cache(loss, predicted, target, aids)
    value.backward()
    assert value.item() == 0.0
    assert all(part.grad.abs().max() < 1e-6 for part in parts)
    assert told.get("cos_sim", torch.tensor(0.8)) <= 1 + 1e-6


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_the_loss(spec):
    loss = LOSSES.parse(spec)
    predicted, target = pair(loss, shapes=((2, 2, 1), (1, 1, 2)), n_tokens=2, share=0.1)
    assert 0 < int((predicted.present & target.present).sum()) < 8
    predicted, target = (rebuilt(kv, [part.double() for part in parts_of(kv)]) for kv in (predicted, target))
    aids = aids_for(target)
    reads = replace(aids.reads, queries=tuple(part.double() for part in aids.reads.queries))
    aids = replace(aids, reads=reads)
    parts = [part.clone().requires_grad_() for part in parts_of(predicted)]
    assert torch.autograd.gradcheck(
        lambda *moved: over_cache(loss, rebuilt(predicted, moved), target, aids)[0], parts
    )


@pytest.mark.parametrize("spec", SPECS)
def test_metrics_are_plain_numbers_on_the_device_and_targets_stay(spec):
    loss = LOSSES.parse(spec)
    predicted, target = pair(loss)
    predicted, _ = leaves(predicted)
    target, targets = leaves(target)
    value, told = over_cache(loss, predicted, target, aids_for(target))
    value.backward()
    assert told and all(part.shape == () and not part.requires_grad for part in told.values())
    assert all(part.grad is None for part in targets)


SIZES = st.tuples(
    st.sampled_from([ORDINARY, RAGGED]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.1, 0.5, 0.95]),
    st.integers(0, 1 << 20),
)


@pytest.mark.parametrize("spec", SPECS)
@given(size=SIZES, poison=st.sampled_from([math.nan, math.inf, 1e30]))
@settings(max_examples=12)
def test_what_an_absent_slot_holds_has_no_influence(spec, size, poison):
    loss = LOSSES.parse(spec)
    shapes, n_tokens, n_batch, share, seed = size
    clean = pair(loss, shapes, n_tokens, n_batch, share, seed)
    aids = aids_for(clean[1])
    found = []
    for predicted, target in (clean, [poisoned(kv, poison) for kv in clean]):
        moved, parts = leaves(predicted)
        value, _ = over_cache(loss, moved, target, aids)
        value.backward()
        found.append((value, parts))
    (value, parts), (spoilt, spoilt_parts) = found
    assert value.isfinite() and torch.equal(value, spoilt)
    absent = [~clean[0].present[list(group.layers)] for group in clean[0].groups for _ in range(2)]
    for one_part, other, gone in zip(parts, spoilt_parts, absent, strict=True):
        assert torch.equal(one_part.grad, other.grad)
        assert not other.grad[gone.unsqueeze(2).expand(other.shape[:-1])].any()


def poisoned(kv: KV, poison: float) -> KV:
    parts = []
    for group in kv.groups:
        absent = ~kv.present[list(group.layers)][:, :, None, :, None]
        parts += [part.masked_fill(absent, poison) for part in (group.keys, group.values)]
    return rebuilt(kv, parts)


@pytest.mark.parametrize("spec", ["cosine", "hybrid", "mercator", "three_term", "whitened_mse", "structural"])
def test_padding_changes_nothing(spec):
    loss = LOSSES.parse(spec)
    predicted, target = (
        cache(RAGGED, n_tokens=6, n_batch=2, seed=seed, space=space_of(loss)) for seed in (0, 1)
    )
    aids = replace(aids_for(target), task=lambda kv: torch.zeros(()))
    gone = target.present.clone()
    gone[:, :, :2] = False
    kept = torch.arange(2, 6)
    padded = over_cache(loss, replace(predicted, present=gone), replace(target, present=gone), aids)
    short = over_cache(loss, predicted.take_tokens(kept), target.take_tokens(kept), aids)
    torch.testing.assert_close(padded, short)


@pytest.mark.parametrize("spec", ["cosine", "hybrid", "mercator(whiten=channel)", "whitened_mse"])
def test_a_batch_is_the_sum_of_its_pieces(spec):
    """By tokens: what the loop needs so that processes and pieces give one gradient."""
    loss = LOSSES.parse(spec)
    present = holes(1, 3, 6, 0.4, seed=3).expand(4, -1, -1)
    predicted, target = (cache(RAGGED, n_tokens=6, n_batch=3, present=present, seed=seed) for seed in (0, 1))
    aids, pieces = aids_for(target), ([0], [1, 2])
    n = [int(present[0, rows].sum()) for rows in pieces]
    each = [over_cache(loss, predicted.take_batch(rows), target.take_batch(rows), aids)[0] for rows in pieces]
    whole = over_cache(loss, predicted, target, aids)[0]
    torch.testing.assert_close(whole, (n[0] * each[0] + n[1] * each[1]) / sum(n))


def test_layers_keys_and_values_count_alike():
    loss = WhitenedMSE()
    predicted, target = pair(loss, share=0.0)
    moments = moments_of([target])
    each = []
    for number, group in enumerate(target.groups):
        for row, layer in enumerate(group.layers):
            for what in (0, 1):
                whole = moments.groups[number][what]
                own = Moments(whole.mean[row], whole.variance[row])
                mask = target.present[layer]
                each.append(loss(predicted.layer(layer)[what], target.layer(layer)[what], mask, own)[0])
    torch.testing.assert_close(
        over_cache(loss, predicted, target, Aids(moments))[0], torch.stack(each).mean()
    )


def test_a_layer_without_tokens_is_left_out_of_the_mean():
    loss = CosineLoss()
    predicted, target = (cache(seed=seed) for seed in (0, 1))
    present = target.present.clone()
    present[1] = False
    some = over_cache(loss, predicted, replace(target, present=present))[0]
    each = [
        loss(predicted.layer(layer)[what], target.layer(layer)[what], present[layer])[0]
        for layer in (0, 2)
        for what in (0, 1)
    ]
    torch.testing.assert_close(some, torch.stack(each).mean())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("structural")])
def test_nothing_waits_for_a_device_or_strays_from_it(spec):
    """On the meta device there are no numbers to look at, and other devices do not mix with it."""
    loss = LOSSES.parse(spec)
    predicted, target = (on_meta(kv) for kv in pair(loss))
    moved, _ = leaves(predicted)
    value, told = over_cache(loss.at(1), moved, target, Aids(moments_of([target]), task=task))
    value.backward()
    assert {part.device.type for part in (value, *told.values())} == {"meta"}


def test_nor_do_the_measures_of_attention():
    queries, slots = drawn()
    far = Slots(*(part.to("meta") for part in vars(slots).values()))
    mask, scores = torch.ones(2, 4, dtype=torch.bool, device="meta"), Scores(0.4, sinks=torch.zeros(6))
    queries = queries.to("meta").requires_grad_()
    found = attention_output_error(queries, far, far, mask, scores), attention_kl(queries, far, far, scores)
    sum(part.sum() for part in found).backward()
    assert queries.grad.device.type == "meta"


def on_meta(kv: KV) -> KV:
    kv = rebuilt(kv, [part.to("meta") for part in parts_of(kv)])
    return replace(kv, present=kv.present.to("meta"), positions=kv.positions.to("meta"))


def test_half_precision_is_compared_in_single():
    loss = MercatorKVLoss()
    predicted, target = pair(loss)
    halves = [rebuilt(kv, [part.bfloat16() for part in parts_of(kv)]) for kv in (predicted, target)]
    singles = [rebuilt(kv, [part.bfloat16().float() for part in parts_of(kv)]) for kv in (predicted, target)]
    assert torch.equal(over_cache(loss, *halves)[0], over_cache(loss, *singles)[0])


# Directions and lengths


@given(scale=st.floats(0.01, 1e4), seed=st.integers(0, 1 << 20))
@settings(max_examples=30)
def test_the_direction_of_mercator_does_not_know_lengths(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted, target = torch.randn(2, 2, 2, 5, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    loss = MercatorKVLoss(beta=0.0)
    moved = predicted.clone().requires_grad_()
    value = loss(moved, target, mask)[0]
    value.backward()
    torch.testing.assert_close(loss(scale * predicted, target, mask)[0], value)
    along = (moved.grad * predicted).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)


def test_the_pull_on_a_length_is_bounded_where_the_vector_is_short():
    target = torch.randn(1, 1, 50, 8, dtype=torch.float64)
    lengths = torch.logspace(-12, 2, 50, dtype=torch.float64).view(1, 1, 50, 1)
    predicted = (lengths * torch.nn.functional.normalize(target, dim=-1)).requires_grad_()
    value = MercatorKVLoss(alpha=0.0, beta=1.0)(predicted, target, torch.ones(1, 50, dtype=torch.bool))[0]
    value.backward()
    pull = 50 * predicted.grad.norm(dim=-1) * target.norm(dim=-1)
    # |d/ds log(s / t) ** 2| = 2 |log(s / t)| / s, which has no bound; the bent one has 2 log(100) * 50 / t.
    assert pull.max() < 2 * math.log(101) * 50
    inwards = (predicted.grad * target).sum(-1).squeeze()
    assert bool((inwards[:40] < 0).all()), "short vectors are told to grow, however short"


def test_at_no_length_at_all_gradients_are_finite():
    for spec in ("mercator", "cosine", "hybrid(whiten=none)"):
        predicted = torch.zeros(1, 1, 3, 4, requires_grad=True)
        LOSSES.parse(spec)(predicted, torch.randn(1, 1, 3, 4), torch.ones(1, 3, dtype=torch.bool))[
            0
        ].backward()
        assert predicted.grad.isfinite().all()


# The schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_transition_begins_with_mse_and_ends_with_the_weights(schedule):
    loss = HybridKVLoss(0.75, 0.25, schedule=schedule, steps=100)
    first, half, last = (loss.at(step) for step in (0, 50, 100))
    assert (first.mercator_weight, first.mse_weight) == (0.0, 1.0)
    assert half.mercator_weight == pytest.approx(0.375)
    assert (last.mercator_weight, last.mse_weight) == (0.75, 0.25)
    assert loss.at(-5) == first and loss.at(10_000) == last
    weights = [loss.at(step).mercator_weight for step in range(101)]
    assert weights == sorted(weights) and len(set(weights)) == 101
    totals = [loss.at(step).mercator_weight + loss.at(step).mse_weight for step in range(101)]
    assert totals == pytest.approx([1.0] * 101)


def test_cosine_is_slow_at_both_ends():
    linear, cosine = (HybridKVLoss(schedule=name, steps=100) for name in ("linear", "cosine"))
    early, late = ([loss.at(step).mercator_weight for loss in (linear, cosine)] for step in (10, 90))
    assert early[1] < early[0] and late[1] > late[0]


def test_a_schedule_without_a_step_is_refused_and_a_constant_one_needs_none():
    predicted, target = pair(HybridKVLoss())
    aids = aids_for(target)
    assert HybridKVLoss().at(7) == HybridKVLoss()
    assert over_cache(HybridKVLoss(), predicted, target, aids)[0] > 0
    with pytest.raises(UsageError, match=r"at\(step\)"):
        over_cache(HybridKVLoss(schedule="cosine"), predicted, target, aids)


def test_at_its_ends_a_hybrid_is_one_loss_and_the_other():
    predicted, target = pair(HybridKVLoss())
    aids = aids_for(target)
    loss = HybridKVLoss(1.0, 0.0, schedule="linear", steps=10)
    ends = [over_cache(loss.at(step), predicted, target, aids)[0] for step in (0, 10)]
    want = [
        over_cache(one_loss, predicted, target, aids)[0]
        for one_loss in (WhitenedMSE(), MercatorKVLoss(whiten="channel"))
    ]
    torch.testing.assert_close(ends, want)


# What queries read


def drawn(n_batch=2, n_heads=2, share=3, n_new=4, n_tokens=6):
    queries = torch.randn(n_batch, n_heads * share, n_new, 8)
    keys, values = torch.randn(n_batch, n_heads, n_tokens, 8), torch.randn(n_batch, n_heads, n_tokens, 5)
    visible = torch.arange(n_tokens) <= torch.arange(n_tokens - n_new, n_tokens).unsqueeze(-1)
    visible = visible.repeat(n_batch, 1, 1)
    visible[0, :, :2] = False
    return queries, Slots(keys, values, visible)


def test_reads_and_weights_are_those_of_torch():
    queries, target = drawn()
    predicted = replace(target, keys=torch.randn_like(target.keys), values=torch.randn_like(target.values))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    reads, weights = [], []
    for slots in (predicted, target):
        seen = slots.visible.unsqueeze(1)
        reads.append(
            scaled_dot_product_attention(queries, slots.keys, slots.values, seen, scale=0.4, enable_gqa=True)
        )
        logits = 0.4 * queries @ slots.keys.repeat_interleave(3, 1).transpose(-1, -2)
        weights.append(logits.masked_fill(~seen, -torch.inf).softmax(-1))
    kept = mask[:, None, :, None]
    error = ((reads[0] - reads[1]) * kept).square().sum((0, 2, 3)) / (reads[1] * kept).square().sum((0, 2, 3))
    each = torch.special.xlogy(weights[1], weights[1]) - torch.special.xlogy(weights[1], weights[0])
    divergence = each.sum(-1)[mask.unsqueeze(1).expand(-1, 6, -1)].mean()
    loss, told = StructuralKVLoss(alpha_output=2.0)(queries, predicted, target, mask, 0.4)
    torch.testing.assert_close(told["output_error"], error.mean())
    torch.testing.assert_close(told["attention_kl"], divergence)
    torch.testing.assert_close(loss, 2 * error.mean() + 0.5 * divergence)


def test_a_sink_takes_part_in_the_divergence():
    queries, slots = drawn()
    sinks, other = torch.randn(6), torch.randn_like(slots.keys)
    found = attention_kl(queries, replace(slots, keys=other), slots, Scores(0.4, sinks=sinks))
    logs = []
    for keys in (other, slots.keys):
        logits = 0.4 * queries @ keys.repeat_interleave(3, 1).transpose(-1, -2)
        column = sinks.view(1, -1, 1, 1).expand(2, -1, 4, 1)
        logs.append(
            torch.cat([logits.masked_fill(~slots.visible.unsqueeze(1), -1e30), column], -1).log_softmax(-1)
        )
    torch.testing.assert_close(found, (logs[1].exp() * (logs[1] - logs[0])).sum(-1))


def test_weights_are_compared_over_the_slots_that_both_caches_hold():
    queries, target = drawn()
    predicted = replace(target, keys=torch.randn_like(target.keys), visible=target.visible.clone())
    predicted.visible[1, :, :3] = False
    both = target.visible & predicted.visible
    want = attention_kl(queries, replace(predicted, visible=both), replace(target, visible=both), Scores(0.4))
    torch.testing.assert_close(attention_kl(queries, predicted, target, Scores(0.4)), want)


def test_a_query_that_sees_nothing_loses_nothing():
    queries, target = drawn()
    target.visible[1] = False
    predicted = replace(target, keys=target.keys.clone().requires_grad_(), values=2 * target.values)
    mask = torch.ones(2, 4, dtype=torch.bool)
    loss, told = StructuralKVLoss()(queries, predicted, target, mask, 0.4)
    loss.backward()
    assert told["attention_kl"] == 0 and told["output_error"].item() == pytest.approx(1.0)
    assert predicted.keys.grad.isfinite().all()


def test_what_the_target_does_not_see_cannot_be_read_wrongly():
    queries, predicted = drawn()
    mask = torch.ones(2, 4, dtype=torch.bool)
    blind = replace(predicted, visible=torch.zeros_like(predicted.visible))
    assert StructuralKVLoss()(queries, predicted, blind, mask, 0.4)[0] == 0
    assert StructuralKVLoss(alpha_attn=0.0)(queries, blind, predicted, mask, 0.4)[0].item() == pytest.approx(
        1.0
    )
    silent = replace(predicted, values=0 * predicted.values)
    assert attention_output_error(queries, predicted, silent, mask, Scores(0.4)).isfinite().all()


def test_autocast_does_not_blur_what_is_read():
    queries, target = drawn()
    predicted = replace(target, keys=target.keys + 0.01 * torch.randn_like(target.keys))
    mask = torch.ones(2, 4, dtype=torch.bool)
    want = StructuralKVLoss()(queries, predicted, target, mask, 0.4)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = StructuralKVLoss()(queries, predicted, target, mask, 0.4)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_models_own_queries_read_its_own_cache_without_error(name):
    """Content keys against rotated ones: the same cache, by either way, under windows, sinks and padding."""
    model = model_of(name)
    tokens = tokens_of([*random_rows(1, 14), *random_rows(1, 9)])
    rotated = capture_rotated(model, tokens, ("queries_rotated",))
    content, other = (
        capture(model, ids).kv for ids in (tokens, tokens_of([*random_rows(1, 14), *random_rows(1, 9)]))
    )
    kv = rotated.kv
    aids = Aids(
        reads=Reads(rotated.evidence.queries_rotated, kv.positions[0], kv.present[0], scores_of(model))
    )
    same, _ = over_cache(StructuralKVLoss(), content, kv, aids)
    foreign, told = over_cache(StructuralKVLoss(), other, kv, aids)
    assert same < 1e-8 and foreign > 0.1 and told["attention_kl"] > 0.01


def test_caches_of_other_tokens_are_compared_by_what_is_read():
    predicted, target = cache(n_tokens=5), cache(n_tokens=7, seed=1)
    aids = aids_for(target)
    assert over_cache(StructuralKVLoss(alpha_attn=0.0), predicted, target, aids)[1].keys() == {"output_error"}
    with pytest.raises(ShapeMismatch, match="5 slots against 7"):
        over_cache(StructuralKVLoss(), predicted, target, aids)


# What fools a plain cosine


@pytest.fixture(scope="module")
def own() -> KV:
    """What a trained model holds of worlds, without its special tokens."""
    texts = [example.context for example in islice(Worlds().examples("dev", 0), 8)]
    return text_slots(capture(load("llama"), texts).kv)


def constant(kv: KV) -> KV:
    """The mean entry of every head, for every token."""
    means = [(part.mean.unsqueeze(1).unsqueeze(-2)) for pairs in moments_of([kv]).groups for part in pairs]
    return rebuilt(kv, [mean.expand_as(part) for mean, part in zip(means, parts_of(kv), strict=True)])


def test_a_constant_looks_good_to_a_plain_cosine_and_to_nothing_centred(own):
    mean, mask = constant(own), own.present[0]
    for layer in range(own.geometry.n_layers):
        got, want = mean.layer(layer)[0], own.layer(layer)[0]
        torch.testing.assert_close(plain_cosine(got, want, mask), mean_vector_cosine(want, mask))
        torch.testing.assert_close(centred_r2(got, want, mask), torch.zeros(len(got[0])), atol=1e-5, rtol=0)
        assert centred_cosine(got, want, mask).abs().max() < 0.05
    aids = Aids(moments_of([own]))
    assert over_cache(MercatorKVLoss(beta=0.0, whiten="channel"), mean, own, aids)[0] > 0.45
    assert over_cache(WhitenedMSE(), mean, own, aids)[0].item() == pytest.approx(1.0, abs=0.02)
    assert over_cache(WhitenedMSE("head"), mean, own, aids)[0].item() == pytest.approx(1.0, abs=0.02)


def test_a_map_that_says_the_mean_has_a_high_cosine_where_the_mean_is_long():
    target = torch.randn(2, 3, 40, 8) + 4 * torch.randn(1, 3, 1, 8)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mean = target.mean((0, 2), keepdim=True).expand_as(target)
    assert plain_cosine(mean, target, mask).min() > 0.9
    assert other_token_cosine(target, mask).min() > 0.8
    assert centred_r2(mean, target, mask).abs().max() < 1e-5
    assert CosineLoss()(mean, target, mask)[0] < 0.1


def test_centred_r2_knows_a_wrong_mean():
    target, mask = torch.tensor([[[[0.0], [2.0], [4.0]]]]), torch.ones(1, 3, dtype=torch.bool)
    # Spread 8; an error of one for each token.
    assert centred_r2(target + 1, target, mask).item() == pytest.approx(1 - 3 / 8)
    assert centred_r2(torch.full_like(target, 2.0), target, mask).item() == 0.0


def test_shuffled_tokens_are_all_pairs_of_different_ones():
    target, mask = torch.randn(2, 1, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :3] = False
    units = torch.nn.functional.normalize(target.transpose(0, 1).flatten(1, 2)[0][mask.flatten()], dim=-1)
    table = units @ units.T
    want = (table.sum() - table.trace()) / (7 * 6)
    torch.testing.assert_close(other_token_cosine(target, mask), want.view(1))


@given(seed=st.integers(0, 1 << 20), shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
@settings(max_examples=25)
def test_centred_measures_do_not_see_a_common_shift(seed, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    predicted, target = torch.randn(2, 2, 2, 6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, generator=generator) > 0.2
    for measure in (centred_cosine, centred_r2):
        want = measure(predicted, target, mask)
        torch.testing.assert_close(measure(scale * predicted + shift, scale * target + shift, mask), want)
        spoilt = predicted.masked_fill(~mask[:, None, :, None], math.nan)
        torch.testing.assert_close(measure(spoilt, target, mask), want)
        torch.testing.assert_close(measure(target, target, mask), torch.ones(2, dtype=torch.float64))


def test_moments_are_those_of_all_tokens_that_are_there(own):
    pieces = [own.take_batch([0, 1, 2]), own.take_batch([3]), own.take_batch([4, 5, 6, 7])]
    found = moments_of(pieces)
    entries = own.groups[0].keys[1].transpose(0, 1).flatten(1, 2)[:, own.present[0].flatten()].double()
    keys, _ = found.groups[0]
    torch.testing.assert_close(keys.mean[1], entries.mean(1).float())
    torch.testing.assert_close(keys.variance[1], entries.var(1, correction=0).float(), rtol=1e-4, atol=1e-7)
    with pytest.raises(UsageError, match="no caches"):
        moments_of([])


# What the receiver expects


@pytest.fixture(scope="module")
def examples():
    return list(islice(Worlds().examples("dev", 1), 3))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_receiver_expects_the_same_behind_its_own_cache(name, examples):
    model = load(name)
    contexts, after = [example.context for example in examples], continuations(model, examples)
    own_logits, kv = full_text_logits(model, contexts, after), text_slots(capture(model, contexts).kv)
    same = full_text_kl(model, kv, after, 1.0, own_logits)
    other = full_text_kl(model, kv.take_batch([1, 2, 0]), after, 1.0, own_logits)
    assert abs(same.loss.item()) < 1e-5 and other.loss > 0.1
    assert same.n_tokens == answer_scores(model, kv, after, 1.0).n_tokens == len(own_logits)
    assert not own_logits.requires_grad


def test_the_receivers_own_expectation_is_what_the_divergence_weighs_by(examples):
    model = load("llama")
    contexts, after = [example.context for example in examples], continuations(model, examples)
    own_logits, kv = full_text_logits(model, contexts, after), text_slots(capture(model, contexts).kv)
    swapped = kv.take_batch([1, 2, 0])
    _, logits = take_over(model, swapped, 1.0, after.tokens, keep=0)
    got, want = (part.log_softmax(-1) for part in (logits[:, :-1][after.scored[:, 1:]], own_logits))
    found = full_text_kl(model, swapped, after, 1.0, own_logits)
    torch.testing.assert_close(found.nats, (want.exp() * (want - got)).sum())


def test_three_terms_train_a_cache_towards_what_the_receiver_expects(examples):
    model = load("llama")
    contexts, after = [example.context for example in examples], continuations(model, examples)
    own_logits, target = full_text_logits(model, contexts, after), text_slots(capture(model, contexts).kv)
    aids = Aids(moments_of([target]), task=lambda kv: full_text_kl(model, kv, after, 1.0, own_logits).loss)
    start = rebuilt(target, [part + 0.5 * torch.randn_like(part) for part in parts_of(target)])
    moved, parts = leaves(start)
    loss, told = over_cache(ThreeTermLoss(), moved, target, aids)
    loss.backward()
    cosine = over_cache(CosineLoss(whiten="channel"), start, target, aids)[0]
    want = told["mse"] + 0.5 * cosine + told["task"]
    torch.testing.assert_close(loss.detach(), want)
    with torch.no_grad():
        nearer = rebuilt(start, [part - 5.0 * part.grad for part in parts])
        _, after_step = over_cache(ThreeTermLoss(), nearer, target, aids)
    assert told["task"] > 0.01 and all(after_step[name] < told[name] for name in ("mse", "task"))


# What cannot be compared


@pytest.mark.parametrize(
    ("spec", "aid"), [("whitened_mse", "moments"), ("structural", "reads"), ("three_term", "task")]
)
def test_a_missing_aid_is_named(spec, aid):
    loss = LOSSES.parse(spec)
    predicted, target = pair(loss)
    assert aid in loss.needs
    with pytest.raises(UsageError, match=f"{spec} needs {aid}"):
        over_cache(loss, predicted, target, replace(aids_for(target), **{aid: None}))


def test_what_is_declared_is_all_that_is_needed():
    for loss in map(LOSSES.parse, SPECS):
        predicted, target = pair(loss)
        aids = aids_for(target)
        only = Aids(**{aid: getattr(aids, aid) for aid in loss.needs})
        torch.testing.assert_close(
            over_cache(loss, predicted, target, only), over_cache(loss, predicted, target, aids)
        )


def test_caches_that_cannot_be_compared_are_refused():
    loss, kv = CosineLoss(), cache()
    with pytest.raises(ShapeMismatch, match="two geometries"):
        over_cache(loss, kv, replace(kv, geometry=geometry(model="ee")))
    with pytest.raises(ShapeMismatch, match=r"\(1, 7\) slots against \(1, 6\)"):
        over_cache(loss, kv, cache(n_tokens=6))
    with pytest.raises(WrongKeySpace):
        over_cache(loss, replace(kv, space="rotated"), kv)
    with pytest.raises(WrongKeySpace):
        moments_of([replace(kv, space="rotated")])
    two = cache(((1, 2, 2), (1, 3, 3)))
    with pytest.raises(ShapeMismatch, match="groups of different layers"):
        over_cache(loss, two, two.with_groups(two.groups[::-1]))
