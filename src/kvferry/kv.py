"""The nouns: `KV`, `Geometry`, `Spans`, `Plan`, `Evidence`, and the function types that rooms hand each other.

Legend of dimension letters, used in every signature of the package:

    layers   layers of a model, or of one group of equal layers     batch   sequences
    heads    key/value heads (never query heads)                    tokens  slots of the cache
    key_dim, value_dim   channels of one head; dim where both agree axes    position axes (1; 3 for M-RoPE)
    queries  query heads                                            hidden  width of the residual stream
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kvferry.errors import NotFinite, ShapeMismatch, WrongKeySpace
from kvferry.rope import RotarySpec

KeySpace = Literal["content", "rotated"]


class Role(IntEnum):
    """What a token is there for."""

    TEXT = 0
    SPECIAL = 1
    TEMPLATE = 2
    PATCH = 3
    PAD = 4


@dataclass(frozen=True)
class Spans:
    """Where each token of one sequence comes from: byte range `[start, end)` of a part, and its role.

    `overlap` is None on the tokens' own grid. On another model's grid it is the class, 0 to 7, of how each token lies
    to the tokens that it was pooled from (`kvferry.align.spans`).
    """

    part: NDArray[np.int32]
    start: NDArray[np.int32]
    end: NDArray[np.int32]
    role: NDArray[np.uint8]
    overlap: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.role)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> "Spans":
        """The spans of some tokens, by number or by mask."""
        overlap = None if self.overlap is None else self.overlap[index]
        return Spans(self.part[index], self.start[index], self.end[index], self.role[index], overlap)

    def widen(self, width: int) -> "Spans":
        """Padding in front, up to `width` tokens."""
        zeros = np.zeros(width - len(self), np.int32)
        part, start, end = (np.concatenate([zeros, numbers]) for numbers in (self.part, self.start, self.end))
        role = np.concatenate([np.full(len(zeros), Role.PAD, np.uint8), self.role])
        overlap = None if self.overlap is None else np.concatenate([zeros.astype(np.uint8), self.overlap])
        return Spans(part, start, end, role, overlap)


@dataclass(frozen=True)
class LayerGeometry:
    """What two layers must share for their caches to be comparable."""

    heads: int
    key_dim: int
    value_dim: int
    rotary: RotarySpec
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None: all of them."""
    chunked: bool = False
    """The window is a block of fixed borders (chunked attention), not a sliding one."""


@dataclass(frozen=True)
class Geometry:
    """Dims and rotation of every layer, and the fingerprints (64 hex digits) of model and tokenizer."""

    layers: tuple[LayerGeometry, ...]
    model: str
    tokenizer: str
    max_positions: int | None = None

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def floats_per_token(self) -> int:
        return sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self.layers)

    def shape_digest(self) -> str:
        """SHA-256 over dims and rotation alone: equal for two fine-tunes of one base."""
        rows = [asdict(layer) for layer in self.layers]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def groups(self) -> list[tuple[int, ...]]:
        """Layer numbers of equal shape, stacked together in a `KV`; in order of first appearance."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            shapes.setdefault((layer.heads, layer.key_dim, layer.value_dim), []).append(index)
        return [tuple(members) for members in shapes.values()]


@dataclass(frozen=True)
class Group:
    """The layers of one shape, stacked. Keys and values are two tensors: their dims and dtypes may differ."""

    layers: tuple[int, ...]
    keys: Float[Tensor, "layers batch heads tokens key_dim"]
    values: Float[Tensor, "layers batch heads tokens value_dim"]


@dataclass(frozen=True)
class KV:
    """A cache in the hand. Frozen and validated once, at construction.

    `present[layer, batch, token]` says which layer holds which token; absent slots are never attended to.
    `positions` are those the keys were made at; in content space they are evidence only. `call_length` is the length
    of the call that made the keys, for rotary rules that depend on it.
    """

    geometry: Geometry
    groups: tuple[Group, ...]
    present: Bool[Tensor, "all_layers batch tokens"]
    positions: Int[Tensor, "axes batch tokens"]
    spans: tuple[Spans, ...]
    space: KeySpace = "content"
    call_length: int = 0

    def __post_init__(self) -> None:
        _check_layers(self)
        _check_tokens(self)

    @property
    def n_batch(self) -> int:
        return self.present.shape[1]

    @property
    def n_tokens(self) -> int:
        return self.present.shape[2]

    @property
    def device(self) -> torch.device:
        return self.present.device

    def layer(
        self, index: int
    ) -> tuple[Float[Tensor, "batch heads tokens key_dim"], Float[Tensor, "batch heads tokens value_dim"]]:
        """Keys and values of one layer, as views."""
        for group in self.groups:
            if index in group.layers:
                row = group.layers.index(index)
                return group.keys[row], group.values[row]
        raise ShapeMismatch(f"layer {index} of {self.geometry.n_layers}", cure="Ask for a layer that exists")

    def with_groups(self, groups: tuple[Group, ...]) -> "KV":
        return replace(self, groups=groups)

    def take_tokens(self, index: Int[Tensor, " kept"]) -> "KV":
        """The cache of the tokens `index` alone, in that order."""
        where = index.cpu().numpy()
        return replace(
            self,
            groups=tuple(
                Group(g.layers, g.keys[..., index, :], g.values[..., index, :]) for g in self.groups
            ),
            present=self.present[..., index],
            positions=self.positions[..., index],
            spans=tuple(spans.take(where) for spans in self.spans),
        )

    def take_batch(self, rows: list[int]) -> "KV":
        """The sequences `rows` alone."""
        return replace(
            self,
            groups=tuple(Group(g.layers, g.keys[:, rows], g.values[:, rows]) for g in self.groups),
            present=self.present[:, rows],
            positions=self.positions[:, rows],
            spans=tuple(self.spans[row] for row in rows),
        )

    def sequences(self) -> Iterator["KV"]:
        """Each sequence alone, without the slots that no layer holds (padding)."""
        for row in range(self.n_batch):
            one = self.take_batch([row])
            yield one.take_tokens(one.present.any(dim=(0, 1)).nonzero().flatten())

    def require_space(self, space: KeySpace) -> None:
        if self.space != space:
            cure = "capture() gives content keys, capture_rotated() rotated ones"
            raise WrongKeySpace(f"keys are {self.space}, {space} keys are needed", cure=cure)

    def require_finite(self) -> None:
        """Raise `NotFinite` naming layer, head and token of the first NaN or infinity in a present slot."""
        for group in self.groups:
            for what, tensor in (("key", group.keys), ("value", group.values)):
                bad = ~tensor.isfinite().all(-1) & self.present[list(group.layers)].unsqueeze(2)
                if bool(bad.any()):
                    row, batch, head, token = (int(i) for i in bad.nonzero()[0])
                    where = f"layer {group.layers[row]}, head {head}, token {token} of sequence {batch}"
                    raise NotFinite(
                        f"{what} at {where} is NaN or infinite",
                        cure="Check the model's dtype: fp16 overflows",
                    )


def stack(caches: Sequence[KV]) -> KV:
    """One left-padded batch of caches of one geometry. Padding slots are absent and zero.

    Raises `ShapeMismatch` for caches of different models or key spaces.
    """
    first, width = caches[0], max(kv.n_tokens for kv in caches)
    if any((kv.geometry, kv.space) != (first.geometry, first.space) for kv in caches):
        raise ShapeMismatch("caches of different models or key spaces", cure="Stack caches of one sender")
    return replace(
        first,
        groups=tuple(_stack_groups([kv.groups[i] for kv in caches], width) for i in range(len(first.groups))),
        present=torch.cat([_widen(kv.present, width, -1) for kv in caches], 1),
        positions=torch.cat([_widen(kv.positions, width, -1) for kv in caches], 1),
        spans=tuple(spans.widen(width) for kv in caches for spans in kv.spans),
        call_length=max(kv.call_length for kv in caches),
    )


def _stack_groups(groups: list[Group], width: int) -> Group:
    keys = torch.cat([_widen(group.keys, width, -2) for group in groups], 1)
    values = torch.cat([_widen(group.values, width, -2) for group in groups], 1)
    return Group(groups[0].layers, keys, values)


def _widen(tensor: Tensor, width: int, axis: int) -> Tensor:
    """Zeros in front, along the token axis."""
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], axis)


def _check_layers(kv: KV) -> None:
    held = [layer for group in kv.groups for layer in group.layers]
    if sorted(held) != list(range(kv.geometry.n_layers)):
        raise ShapeMismatch(
            f"groups hold layers {held}", cure=f"Hold each of {kv.geometry.n_layers} layers once"
        )
    for group in kv.groups:
        n_layers = len(group.layers)
        if (len(group.keys), len(group.values)) != (n_layers, n_layers):
            what = f"{len(group.keys)} keys and {len(group.values)} values for {n_layers} layers"
            raise ShapeMismatch(what, cure="Stack one of each per layer")
        key_shape, value_shape = tuple(group.keys.shape[1:]), tuple(group.values.shape[1:])
        for index in group.layers:
            layer = kv.geometry.layers[index]
            body = (kv.n_batch, layer.heads, kv.n_tokens)
            if key_shape != (*body, layer.key_dim) or value_shape != (*body, layer.value_dim):
                want = f"{(*body, layer.key_dim)} and {(*body, layer.value_dim)}"
                raise ShapeMismatch(
                    f"layer {index} holds {key_shape} and {value_shape}", cure=f"The geometry asks for {want}"
                )


def _check_tokens(kv: KV) -> None:
    shape = (kv.geometry.n_layers, kv.n_batch, kv.n_tokens)
    if tuple(kv.present.shape) != shape or tuple(kv.positions.shape[1:]) != shape[1:]:
        got = f"present {tuple(kv.present.shape)} and positions {tuple(kv.positions.shape)}"
        raise ShapeMismatch(got, cure=f"present must be {shape}, positions (axes, {shape[1]}, {shape[2]})")
    if [len(spans) for spans in kv.spans] != [kv.n_tokens] * kv.n_batch:
        got = [len(spans) for spans in kv.spans]
        raise ShapeMismatch(f"spans of lengths {got}", cure=f"Give {kv.n_batch} of length {kv.n_tokens}")


@dataclass(frozen=True)
class Plan:
    """What to send: the precision class of each token, per layer and for K and V. Class 0 is dropped."""

    classes: UInt8[Tensor, "layers 2 tokens"]

    @classmethod
    def everything(cls, kv: KV, row: int = 0) -> "Plan":
        """Every token that is present, in class 1."""
        return cls(kv.present[:, row].to(torch.uint8).unsqueeze(1).repeat(1, 2, 1))


@dataclass(frozen=True)
class Evidence:
    """What capture recorded beside K and V, per layer, and only what was asked for."""

    queries_content: tuple[Float[Tensor, "batch _queries tokens _key_dim"], ...] = ()
    queries_rotated: tuple[Float[Tensor, "batch _queries tokens _key_dim"], ...] = ()
    attention_mass: tuple[Float[Tensor, "batch _heads tokens"], ...] = ()
    hidden_states: tuple[Float[Tensor, "batch tokens _hidden"], ...] = ()

    def sequence(self, row: int, tokens: Int[Tensor, " kept"]) -> "Evidence":
        """The evidence of one sequence alone, of these of its tokens."""
        return Evidence(
            queries_content=tuple(x[row : row + 1, :, tokens] for x in self.queries_content),
            queries_rotated=tuple(x[row : row + 1, :, tokens] for x in self.queries_rotated),
            attention_mass=tuple(x[row : row + 1, :, tokens] for x in self.attention_mass),
            hidden_states=tuple(x[row : row + 1, tokens] for x in self.hidden_states),
        )


@dataclass(frozen=True)
class Menu:
    """What each precision class of a codec would cost and lose, of one sequence: slot by slot, by layer and K or V.

    `error` is the squared error of a slot in the codec's own measure, by head; class 0, a slot that is dropped, is not
    on the menu. `bits` are ideal ones: no headers, no sets, no rounding to bytes.
    """

    classes: tuple[int, ...]
    error: tuple[Float[Tensor, "classes 2 _ tokens"], ...]
    bits: tuple[Float[Tensor, "classes 2 _ tokens"], ...]
    units: tuple[tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]], ...] = ()
    """What errors are counted in, by layer, `[heads, dim]` of keys and of values; empty for codecs without steps."""


Need = Literal["queries_content", "queries_rotated", "attention_mass", "hidden_states"]
Roundtrip = Callable[[KV], KV]
"""A cache coded and decoded again: what the wire will do to it."""
Cost = Callable[[Plan], int]
"""The fewest bytes that a plan can be sent in: exact, and those of the coarsest step where a codec has steps."""
Offer = Callable[[], Menu]
"""The menu of a codec for the cache in the hand."""
Readout = Callable[[KV], KV]
"""A cache as the receiver would see it."""
