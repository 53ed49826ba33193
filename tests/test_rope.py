"""Rotation and its inverse, as pure functions."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.errors import BadSpec, ShapeMismatch
from kvferry.rope import NO_ROTATION, LongRule, RotarySpec, _check, rotate, strip

HEADS, TOKENS = 2, 5
RULE = LongRule("dynamic", threshold=64, base=10_000.0, factor=4.0)


def table(pairs: int, base: float = 10_000.0) -> tuple[float, ...]:
    return tuple((1.0 / base ** (torch.arange(pairs) / pairs)).tolist())


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Of a `RotarySpec`; it is made in the test, because its types are checked with `random`."""
    pairs = draw(st.integers(1, 8))
    cut = sorted(draw(st.lists(st.integers(0, pairs), min_size=2, max_size=2)))
    sections = (cut[0], cut[1] - cut[0], pairs - cut[1]) if draw(st.booleans()) else ()
    return {
        "style": draw(st.sampled_from(["half", "interleaved"])),
        "dim": 2 * pairs,
        "inv_freq": table(pairs),
        "scaling": draw(st.floats(0.5, 2.0)),
        "sections": sections,
        "section_order": draw(st.sampled_from(["blocks", "turns"])),
        "long": RULE if pairs > 1 else None,
    }


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=fields(),
    seed=st.integers(0, 999),
    extra=st.integers(0, 3),
    last=st.integers(0, 100_000),
    call_length=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_strip_undoes_rotate(
    fields: dict[str, Any], seed: int, extra: int, last: int, call_length: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    spec = RotarySpec(**fields)
    keys = torch.randn(3, 2, HEADS, TOKENS, spec.dim + extra).to(dtype)
    axes = len(spec.sections) or 1
    positions = torch.randint(0, last + 1, (axes, 2, TOKENS))
    there = rotate(keys, positions, spec, call_length)
    back = strip(there, positions, spec, call_length)
    assert there.dtype == back.dtype == torch.float32
    assert torch.equal(there[..., spec.dim :], keys[..., spec.dim :].float())
    torch.testing.assert_close(back, keys.float(), atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_scores_depend_on_distance_alone(style: str) -> None:
    spec = RotarySpec(style, dim=16, inv_freq=table(8))
    query, key = torch.randn(2, 1, 1, 1, 16)
    at = torch.arange(1).reshape(1, 1, 1)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        return (rotate(query, at + query_at, spec) * rotate(key, at + key_at, spec)).sum()

    torch.testing.assert_close(score(9, 4), score(1009, 1004), atol=1e-3, rtol=0)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_styles_agree_up_to_the_order_of_channels() -> None:
    keys, positions = torch.randn(1, 2, 3, 8), torch.tensor([[[0, 5, 900]]])
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half = rotate(keys, positions, RotarySpec("half", 8, table(4)))
    turned = rotate(keys[..., order], positions, RotarySpec("interleaved", 8, table(4)))
    assert torch.equal(half[..., order], turned)


def test_stacked_layers_equal_single_ones() -> None:
    keys, positions, spec = (
        torch.randn(3, 2, HEADS, TOKENS, 8),
        torch.arange(10).reshape(1, 2, 5),
        RotarySpec("half", 8, table(4)),
    )
    stacked = rotate(keys, positions, spec)
    assert torch.equal(stacked, torch.stack([rotate(layer, positions, spec) for layer in keys]))


def test_no_rotation_is_identity_in_fp32() -> None:
    keys = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(rotate(keys, torch.zeros(1, 1, 3, dtype=torch.long), NO_ROTATION), keys.float())


def test_gradients_pass_and_keep_their_norm() -> None:
    keys = torch.randn(1, 1, 4, 8, requires_grad=True)
    spec, positions = RotarySpec("interleaved", 8, table(4), scaling=2.0), torch.arange(4).reshape(1, 1, 4)
    with torch.inference_mode():
        rotate(keys.detach(), positions, spec)  # what is kept from here must not poison training
    rotate(keys, positions, spec).square().sum().backward()
    assert keys.grad is not None
    torch.testing.assert_close(keys.grad, 2 * 4.0 * keys.detach())


@pytest.mark.parametrize(
    ("order", "axes"), [("blocks", [0, 0, 1, 2]), ("turns", [0, 1, 2, 0])], ids=["blocks", "turns"]
)
def test_sections_take_their_own_axis(order: str, axes: list[int]) -> None:
    spec = RotarySpec("half", 8, (1.0, 0.5, 0.25, 0.125), sections=(2, 1, 1), section_order=order)
    positions = torch.tensor([[[3]], [[50]], [[700]]])
    turned = rotate(torch.cat((torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)), -1), positions, spec)
    angles = torch.tensor([spec.inv_freq[pair] * float(positions[axis]) for pair, axis in enumerate(axes)])
    torch.testing.assert_close(turned.flatten(), torch.cat((angles.cos(), angles.sin())))


def test_one_axis_serves_all_sections() -> None:
    spec = RotarySpec("half", 8, table(4), sections=(2, 1, 1))
    keys, positions = torch.randn(1, 1, 4, 8), torch.arange(4).reshape(1, 1, 4)
    assert torch.equal(rotate(keys, positions, spec), rotate(keys, positions.expand(3, -1, -1), spec))


def test_rules_for_long_calls_begin_after_the_threshold() -> None:
    rule = LongRule("longrope", threshold=32, inv_freq=(0.5, 0.25), scaling=1.5)
    spec = RotarySpec("half", 4, (1.0, 0.5), scaling=1.25, long=rule)
    assert spec.for_call(32) == RotarySpec("half", 4, (1.0, 0.5), scaling=1.25)
    assert spec.for_call(33) == RotarySpec("half", 4, (0.5, 0.25), scaling=1.5)
    dynamic = RotarySpec("half", 8, table(4), long=LongRule("dynamic", 32, base=10_000.0, factor=4.0))
    assert dynamic.for_call(32).inv_freq == table(4)
    first, *slower = dynamic.for_call(64).inv_freq
    assert first == 1.0
    # base * (4 * 64 / 32 - 3) ** (8 / 6), as in the rule's definition
    torch.testing.assert_close(slower, list(table(4, 10_000.0 * 5 ** (8 / 6))[1:]))


@pytest.mark.parametrize(
    "positions",
    [torch.zeros(1, 1, 4), torch.zeros(1, 2, 3), torch.zeros(2, 1, 3), torch.zeros(3, 1, 3)],
    ids=["tokens", "batch", "two axes", "axes without sections"],
)
def test_positions_must_fit(positions: torch.Tensor) -> None:
    with pytest.raises(ShapeMismatch):
        # Not through rotate: in tests the shapes in its signature are checked before it can.
        _check(torch.zeros(1, 1, 3, 8), positions, RotarySpec("half", 8, table(4)))


def test_keys_must_be_wide_enough() -> None:
    with pytest.raises(ShapeMismatch, match="8 channels turn, but keys have 4"):
        strip(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3).long(), RotarySpec("half", 8, table(4)))


def test_specs_must_add_up() -> None:
    with pytest.raises(BadSpec, match="4 frequencies turn 6 channels"):
        RotarySpec("half", 6, table(4))
    with pytest.raises(BadSpec, match="add up to 4"):
        RotarySpec("half", 8, table(4), sections=(2, 1))
