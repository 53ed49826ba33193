"""What a model has read, as a `KV`: one prefill, keys brought to content space layer by layer.

Peak memory above the cache is one layer: each layer's keys are stripped and stored as soon as its attention has run,
and no second cache is kept beside.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.errors import ContextTooLong, EmptyContext, UnknownName
from kvferry.kv import KV, Evidence, Group, KeySpace, LayerGeometry, Need
from kvferry.models.load import Model
from kvferry.models.rotary import reset_call_state
from kvferry.models.tap import Pass, call_filler, controlled, inner_implementation
from kvferry.models.tokens import Tokens
from kvferry.rope import strip


@dataclass(frozen=True)
class Captured:
    """A cache and the evidence that was asked for."""

    kv: KV
    evidence: Evidence


def capture(
    model: Model, inputs: Sequence[str] | Tokens, needs: Collection[Need] = (), *, call_length: int = 0
) -> Captured:
    """Read texts (after the model's own head) and return the cache in content space, keys in fp32.

    `needs` names evidence to record: queries_content, queries_rotated, attention_mass, hidden_states. `call_length`
    is the length of the prompt that the context is part of, if known: models whose rotary frequencies depend on it
    (longrope, dynamic) then read the context as they would have read it there.
    Raises `EmptyContext`, `ContextTooLong`.
    """
    return _capture(model, inputs, needs, call_length, "content")


def capture_rotated(
    model: Model, inputs: Sequence[str] | Tokens, needs: Collection[Need] = (), *, call_length: int = 0
) -> Captured:
    """The cache exactly as the model made it, rotated keys in the model's dtype: for transfer to the same model."""
    return _capture(model, inputs, needs, call_length, "rotated")


def _capture(
    model: Model, inputs: Sequence[str] | Tokens, needs: Collection[str], call_length: int, space: KeySpace
) -> Captured:
    for need in needs:
        if need not in get_args(Need):
            raise UnknownName("kind of evidence", need, get_args(Need))
    tokens = inputs if isinstance(inputs, Tokens) else _tokens(model, inputs)
    mask = tokens.mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    call_length = max(call_length, int(tokens.lengths.max()))
    _check_length(model, call_length)
    record = _Recorder(model, positions, mask, call_length, space, frozenset(needs))
    hidden = _prefill(model, tokens.ids.to(model.device), record)
    kv = KV(
        geometry=model.geometry,
        groups=record.groups,
        present=mask.expand(model.geometry.n_layers, -1, -1).clone(),
        positions=positions.unsqueeze(0),
        spans=tokens.spans,
        space=space,
        call_length=call_length,
    )
    return Captured(kv, record.evidence(hidden))


def _tokens(model: Model, texts: Sequence[str]) -> Tokens:
    for row, text in enumerate(texts):
        if not text.strip():
            raise EmptyContext(f"context {row} holds no text", cure="Give the sender something to read")
    return model.contexts(list(texts))


def _check_length(model: Model, n_tokens: int) -> None:
    limit = model.geometry.max_positions
    if limit is not None and n_tokens > limit:
        cure = "Shorten the context, or choose a model with more positions"
        raise ContextTooLong(
            f"the context has {n_tokens} tokens, {model.name} has {limit} positions", cure=cure
        )


@torch.no_grad()
def _prefill(model: Model, ids: Int[Tensor, "batch tokens"], record: "_Recorder") -> tuple[Tensor, ...]:
    n_tokens = ids.shape[1]
    filler = call_filler(model.geometry, record.positions, record.call_length)
    parts = zip((ids, record.mask, record.positions), filler, strict=True)
    ids, mask, positions = (torch.cat(pair, -1) for pair in parts)
    current = Pass(
        geometry=model.geometry,
        query_positions=positions,
        key_positions=positions,
        valid=mask.expand(model.geometry.n_layers, -1, -1),
        same_everywhere=True,
        inner=inner_implementation(model.hf, weights="attention_mass" in record.needs),
        watch=record,
    )
    with model.exclusive, controlled(model.hf, current):
        reset_call_state(model.hf)
        output = model.hf.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            output_hidden_states="hidden_states" in record.needs,
        )
    return tuple(states[:, :n_tokens] for states in output.hidden_states or ())


@dataclass
class _Recorder:
    """Receives each layer's attention inputs and writes them where they belong."""

    model: Model
    positions: Int[Tensor, "batch tokens"]
    mask: Tensor
    call_length: int
    space: KeySpace
    needs: frozenset[str]
    groups: tuple[Group, ...] = ()
    queries_content: dict[int, Tensor] = field(default_factory=dict)
    queries_rotated: dict[int, Tensor] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        geometry, (n_batch, n_tokens) = self.model.geometry, self.positions.shape
        self.groups = tuple(
            _empty_group(members, geometry.layers[members[0]], n_batch, n_tokens, self.model, self.space)
            for members in geometry.groups()
        )

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None) -> None:
        n = self.positions.shape[1]  # the filler of a longer call comes after
        query, key, value = query[:, :, :n], key[:, :, :n], value[:, :, :n]
        group = next(group for group in self.groups if layer in group.layers)
        row = group.layers.index(layer)
        group.keys[row] = key if self.space == "rotated" else self._strip(layer, key)
        group.values[row] = value
        if "queries_rotated" in self.needs:
            self.queries_rotated[layer] = query
        if "queries_content" in self.needs:
            self.queries_content[layer] = self._strip(layer, query)
        if weights is not None and "attention_mass" in self.needs:
            self.mass[layer] = self._received(weights[:, :, :n, :n], n_heads=key.shape[1])

    def evidence(self, hidden: tuple[Tensor, ...]) -> Evidence:
        return Evidence(
            queries_content=_in_order(self.queries_content),
            queries_rotated=_in_order(self.queries_rotated),
            attention_mass=_in_order(self.mass),
            hidden_states=hidden[:-1],
        )

    def _strip(self, layer: int, states: Tensor) -> Float[Tensor, "batch heads tokens dim"]:
        rotary = self.model.geometry.layers[layer].rotary
        return strip(states, self.positions.unsqueeze(0), rotary, self.call_length)

    def _received(self, weights: Tensor, n_heads: int) -> Float[Tensor, "batch heads tokens"]:
        """Attention that each slot received, summed over queries and over the query heads of a group."""
        mass = (weights.float() * self.mask[:, None, :, None]).sum(2)
        return mass.unflatten(1, (n_heads, -1)).sum(2) * self.mask[:, None]


def _empty_group(
    members: tuple[int, ...], layer: LayerGeometry, n_batch: int, n_tokens: int, model: Model, space: KeySpace
) -> Group:
    shape = (len(members), n_batch, layer.heads, n_tokens)
    key_dtype = torch.float32 if space == "content" else model.dtype
    return Group(
        members,
        torch.empty(*shape, layer.key_dim, dtype=key_dtype, device=model.device),
        torch.empty(*shape, layer.value_dim, dtype=model.dtype, device=model.device),
    )


def _in_order(by_layer: dict[int, Tensor]) -> tuple[Tensor, ...]:
    return tuple(by_layer[layer] for layer in sorted(by_layer))
