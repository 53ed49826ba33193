"""What a model holds while it reads: a cache whose slots may come from anywhere, and the masks that make it right.

Rule 1: a slot is valid per layer. Padding, dropped tokens and tokens that only some layers received are invalid slots,
masked in prefill and in every decode step alike.
Rule 2: positions belong to slots, not to indices; a hole moves nothing.
Rule 3: one `DynamicCache` without config, which keeps every slot on sliding layers too: the mask applies the window.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from kvferry.errors import ContextTooLong, ForeignModel, ShapeMismatch, UsageError
from kvferry.kv import KV, Group, Spans
from kvferry.models.load import Model
from kvferry.models.rotary import reset_call_state
from kvferry.models.tap import Pass, call_filler, controlled, inner_implementation
from kvferry.models.tokens import Tokens
from kvferry.rope import rotate


@dataclass
class State:
    """A model's working cache. Created by `empty`, grown by `read` and `inject`, changed by `put`."""

    model: Model
    cache: DynamicCache
    valid: Bool[Tensor, "layers batch slots"]
    positions: Int[Tensor, "batch slots"]
    next_position: Int[Tensor, " batch"]
    call_length: int
    same_everywhere: bool = True


def empty(model: Model, n_batch: int = 1, *, call_length: int = 0) -> State:
    """A state without slots.

    `call_length` is the number of positions the whole prompt will have; models whose rotary frequencies depend on it
    (longrope, dynamic) then read every part as if the prompt came in one call.
    """
    device = model.device
    return State(
        model=model,
        cache=DynamicCache(),
        valid=torch.zeros(model.geometry.n_layers, n_batch, 0, dtype=torch.bool, device=device),
        positions=torch.zeros(n_batch, 0, dtype=torch.long, device=device),
        next_position=torch.zeros(n_batch, dtype=torch.long, device=device),
        call_length=call_length,
    )


def read(state: State, tokens: Tokens, *, keep: int = 1) -> Float[Tensor, "batch keep vocab"]:
    """Let the model read tokens after what it holds; logits of the last `keep` tokens (0: of all).

    Raises `ContextTooLong` where the model has no position left.
    """
    mask = tokens.mask.to(state.model.device)
    positions = state.next_position.unsqueeze(-1) + mask.cumsum(-1) - 1
    return read_at(state, tokens, positions, keep=keep)


def read_at(
    state: State, tokens: Tokens, positions: Int[Tensor, "batch new"], *, keep: int = 1
) -> Float[Tensor, "batch keep vocab"]:
    """`read` at given positions; a token sees every slot whose position is not after its own, in whatever order
    the slots came. Reading goes on after the last position."""
    model = state.model
    ids, mask = tokens.ids.to(model.device), tokens.mask.to(model.device)
    _check_room(state, mask, positions)
    state.next_position = torch.where(mask, positions + 1, state.next_position.unsqueeze(-1)).amax(-1)
    positions = positions.clamp(min=0)
    filler = call_filler(model.geometry, positions, state.call_length)
    parts = zip((ids, mask, positions), filler, strict=True)
    ids, mask, positions = (torch.cat(pair, -1) for pair in parts)
    _append_slots(state, mask.expand(model.geometry.n_layers, -1, -1), positions)
    n_filler = filler[0].shape[1]
    logits = _forward(state, ids, positions, keep + n_filler if keep else 0)
    return logits[:, : logits.shape[1] - n_filler]


def inject(
    state: State,
    kv: KV,
    positions: Int[Tensor, "batch tokens"],
    next_position: Int[Tensor, " batch"],
) -> None:
    """Append the slots of `kv` at the receiver's `positions`; reading goes on at `next_position`.

    Content-space keys are rotated here, in fp32. Rotated keys are taken as they are and must keep their positions.
    Raises `ForeignModel` for a cache of another geometry, `ShapeMismatch` for rotated keys that would move.
    """
    model = state.model
    _require_own(model, kv)
    if kv.space == "rotated" and not bool((kv.positions[0] == positions)[kv.present.any(0)].all()):
        raise ShapeMismatch(
            "rotated keys at other positions", cure="Inject at kv.positions, or capture content keys"
        )
    positions, present = positions.to(model.device), kv.present.to(model.device)
    call_length = max(state.call_length, kv.call_length if kv.space == "rotated" else 0)
    for index, layer in enumerate(model.geometry.layers):
        keys, values = (part.to(model.device) for part in kv.layer(index))
        if kv.space == "content":
            keys = rotate(keys, positions.unsqueeze(0), layer.rotary, call_length)
        absent = ~present[index, :, None, :, None]
        # Zero, whatever stood there: a masked NaN is still a NaN after softmax times value.
        keys, values = (part.to(model.dtype).masked_fill(absent, 0) for part in (keys, values))
        state.cache.update(keys, values, index)
    _append_slots(state, present, positions)
    state.same_everywhere = state.same_everywhere and bool((present == present[:1]).all())
    state.next_position = next_position.to(model.device)


def held(state: State, spans: tuple[Spans, ...]) -> KV:
    """The first slots that the state holds, as a cache with rotated keys; one for each token of `spans`.

    Raises `ShapeMismatch` where the state holds fewer.
    """
    n_tokens, geometry = len(spans[0]), state.model.geometry
    if n_tokens > state.positions.shape[1]:
        cure = "Give the spans of what the state has read"
        raise ShapeMismatch(f"{n_tokens} tokens of {state.positions.shape[1]} slots", cure=cure)
    return KV(
        geometry=geometry,
        groups=tuple(_held_group(state, members, n_tokens) for members in geometry.groups()),
        present=state.valid[..., :n_tokens],
        positions=state.positions[:, :n_tokens].unsqueeze(0),
        spans=spans,
        space="rotated",
        call_length=state.call_length,
    )


def put(state: State, kv: KV) -> None:
    """Overwrite keys and values of the first slots by those of a cache with rotated keys, as `held` gave it.

    Slots stay where they are and as valid as they were. Raises `ForeignModel`, `ShapeMismatch`, `WrongKeySpace`.
    """
    model = state.model
    kv.require_space("rotated")
    _require_own(model, kv)
    if kv.present.shape[1:] != state.valid[..., : kv.n_tokens].shape[1:]:
        cure = "Give a cache of the slots that the state holds"
        raise ShapeMismatch(
            f"{kv.n_batch} x {kv.n_tokens} slots for {tuple(state.positions.shape)}", cure=cure
        )
    cache = DynamicCache()
    for index in range(model.geometry.n_layers):
        keys, values = kv.layer(index)
        cache.update(keys.to(model.dtype), values.to(model.dtype), index)
        if kv.n_tokens < state.positions.shape[1]:
            keys, values = (part[:, :, kv.n_tokens :] for part in _slots(state, index))
            cache.update(keys, values, index)
    state.cache = cache


def generate_inputs(state: State, tokens: Tokens) -> dict[str, Tensor | DynamicCache]:
    """Arguments for `model.hf.generate(**...)`, which reads `tokens` and goes on from this state.

    Raises `UsageError` where transformers could not mask it: slots held by some layers only, or holes under a window.
    """
    windows = any(layer.window is not None for layer in state.model.geometry.layers)
    holes = not bool(state.valid.all())
    if not state.same_everywhere or (windows and holes):
        cure = "Use kvferry.generate, which masks slots by layer and position"
        raise UsageError(
            "transformers cannot mask a cache with holes per layer or under a sliding window", cure=cure
        )
    mask = torch.cat([state.valid[0], tokens.mask.to(state.model.device)], -1)
    positions = (state.next_position.unsqueeze(-1) + tokens.mask.to(state.model.device).cumsum(-1) - 1).clamp(
        min=0
    )
    return {
        "input_ids": tokens.ids.to(state.model.device),
        "past_key_values": state.cache,
        "attention_mask": mask.long(),
        "position_ids": positions,
    }


def _require_own(model: Model, kv: KV) -> None:
    if kv.geometry.model != model.geometry.model:
        cure = "Align it to this model first"
        raise ForeignModel(
            f"a cache of model {kv.geometry.model[:16]} for {model.geometry.model[:16]}", cure=cure
        )


def _slots(state: State, index: int) -> tuple[Tensor, Tensor]:
    layer: Any = state.cache.layers[index]
    return layer.keys, layer.values


def _held_group(state: State, members: tuple[int, ...], n_tokens: int) -> Group:
    keys, values = zip(*(_slots(state, index) for index in members), strict=True)
    return Group(members, torch.stack(keys)[..., :n_tokens, :], torch.stack(values)[..., :n_tokens, :])


def _forward(state: State, ids: Tensor, positions: Tensor, keep: int) -> Float[Tensor, "batch keep vocab"]:
    model = state.model
    current = Pass(
        geometry=model.geometry,
        query_positions=positions,
        key_positions=state.positions,
        valid=state.valid,
        same_everywhere=state.same_everywhere,
        inner=inner_implementation(model.hf),
    )
    with model.exclusive, controlled(model.hf, current):
        reset_call_state(model.hf)
        output = model.hf(
            input_ids=ids,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
    return output.logits


def _append_slots(
    state: State, valid: Bool[Tensor, "layers batch new"], positions: Int[Tensor, "batch new"]
) -> None:
    state.valid = torch.cat([state.valid, valid], -1)
    state.positions = torch.cat([state.positions, positions], -1)


def _check_room(state: State, mask: Bool[Tensor, "batch new"], positions: Int[Tensor, "batch new"]) -> None:
    limit = state.model.geometry.max_positions
    # Slots bound positions from above almost always, and asking for them does not wait for the device.
    if limit is None or state.positions.shape[1] + mask.shape[1] <= limit:
        return
    last = int((positions * mask).max()) + 1
    if last > limit:
        cure = "Shorten the context, or choose a model with more positions"
        raise ContextTooLong(f"{last} positions are needed, {state.model.name} has {limit}", cure=cure)
