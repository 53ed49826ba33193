"""What every member of a table owes its users, and the ragged caches that try it. Each test file hands in members."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kvferry.codec import Codec, decode, roundtrip
from kvferry.errors import BudgetTooSmall, ForeignModel, NotFinite, ShapeMismatch, UsageError, WrongKeySpace
from kvferry.kv import KV, Geometry, Group, LayerGeometry, Plan, Spans
from kvferry.rope import NO_ROTATION
from kvferry.spec import Method, Table
from kvferry.wire import SegmentType, pack, unpack

ORDINARY = ((2, 4, 4), (2, 4, 4), (2, 4, 4))
RAGGED = ((2, 4, 6), (1, 3, 3), (2, 4, 6), (3, 1, 2))


def geometry(shapes=ORDINARY, model="ab") -> Geometry:
    """Layers of `(heads, key_dim, value_dim)`."""
    layers = tuple(LayerGeometry(*shape, rotary=NO_ROTATION) for shape in shapes)
    return Geometry(layers, model=model * 32, tokenizer="cd" * 32)


def spans(n_tokens, roles=None) -> Spans:
    zeros = np.zeros(n_tokens, np.int32)
    return Spans(zeros, zeros, zeros, np.zeros(n_tokens, np.uint8) if roles is None else roles)


def cache(shapes=ORDINARY, n_tokens=7, n_batch=1, present=None, seed=0, scale=1.0, **fields) -> KV:
    """Normal numbers in every slot, present or not."""
    generator = torch.Generator().manual_seed(seed)
    sender = geometry(shapes)

    def draw(layers, dim):
        shape = (len(layers), n_batch, sender.layers[layers[0]].heads, n_tokens, dim)
        return scale * torch.randn(shape, generator=generator)

    first = [(layers, sender.layers[layers[0]]) for layers in sender.groups()]
    groups = tuple(
        Group(layers, draw(layers, one.key_dim), draw(layers, one.value_dim)) for layers, one in first
    )
    if present is None:
        present = torch.ones(sender.n_layers, n_batch, n_tokens, dtype=torch.bool)
    positions = torch.arange(n_tokens).expand(1, n_batch, n_tokens)
    fields = {"positions": positions, "spans": (spans(n_tokens),) * n_batch, **fields}
    return KV(geometry=sender, groups=groups, present=present, **fields)


@dataclass(frozen=True)
class Recipe:
    """How to make a ragged cache: holes, gaps in positions, roles, extreme values.

    It is built in the test, not while drawing: the type checks draw random numbers of their own.
    """

    shapes: tuple[tuple[int, int, int], ...]
    n_tokens: int
    n_batch: int
    holes: float
    axes: int
    jump: int
    scale: float
    space: str
    call_length: int
    n_roles: int
    outliers: bool
    seed: int

    def build(self) -> KV:
        generator = torch.Generator().manual_seed(self.seed)
        slots = (len(self.shapes), self.n_batch, self.n_tokens)
        tokens = (self.axes, self.n_batch, self.n_tokens)
        jumps = torch.randint(-1 if self.axes > 1 else 1, self.jump, tokens, generator=generator)
        roles = torch.randint(self.n_roles, tokens[1:], generator=generator).to(torch.uint8).numpy()
        kv = cache(
            self.shapes,
            self.n_tokens,
            self.n_batch,
            present=torch.rand(slots, generator=generator) >= self.holes,
            seed=self.seed,
            scale=self.scale,
            positions=jumps.cumsum(-1),
            spans=tuple(spans(self.n_tokens, row) for row in roles),
            space=self.space,
            call_length=self.call_length,
        )
        return _with_outliers(kv) if self.outliers else kv


def recipes(max_batch=1) -> st.SearchStrategy[Recipe]:
    """Ragged geometries with any number of tokens from 0."""
    return st.builds(
        Recipe,
        shapes=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=4).map(tuple),
        n_tokens=st.integers(0, 13),
        n_batch=st.integers(1, max_batch),
        holes=st.sampled_from([0.0, 0.3, 0.9]),
        axes=st.sampled_from([1, 1, 3]),
        jump=st.sampled_from([2, 3, 40]),
        scale=st.sampled_from([0.0, 1e-42, 1e-7, 1.0, 150.0]),
        space=st.sampled_from(["content", "rotated"]),
        call_length=st.sampled_from([0, 7, 40_000]),
        n_roles=st.sampled_from([1, 2, 5]),
        outliers=st.booleans(),
        seed=st.integers(0, 1 << 30),
    )


def _with_outliers(kv: KV) -> KV:
    """A channel 60 times as large, another one constant."""
    groups = []
    for group in kv.groups:
        keys, values = group.keys.clone(), group.values.clone()
        keys[..., 0] *= 60
        values[..., -1] = 3.5
        groups.append(Group(group.layers, keys, values))
    return kv.with_groups(tuple(groups))


def check_spec(table: Table, method: Method) -> None:
    """A method is its configuration, as text and as JSON."""
    assert table.parse(repr(method)) == method
    assert repr(table.parse(repr(method))) == repr(method)
    again = table.from_json(json.loads(json.dumps(method.to_json())))
    assert again == method
    assert again.to_json() == method.to_json()


def same(a: KV, b: KV) -> None:
    """Equal to the bit, where a token is held; both are zero elsewhere."""
    assert torch.equal(a.present, b.present)
    assert torch.equal(a.positions, b.positions)
    assert (a.space, a.call_length) == (b.space, b.call_length)
    assert all((x.role == y.role).all() for x, y in zip(a.spans, b.spans, strict=True))
    for one, other in zip(a.groups, b.groups, strict=True):
        assert one.layers == other.layers
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def taken(codec: Codec, kv: KV) -> KV:
    """The cache in a key space that the codec takes."""
    return kv if kv.space in codec.spaces else replace(kv, space=codec.spaces[0])


def over_the_wire(codec: Codec, kv: KV) -> KV:
    return decode(unpack(pack(codec.encode(kv))), kv.geometry)


def check_batched_equals_single(codec: Codec, kv: KV) -> None:
    """The tensor-only roundtrip of a batch is what the bytes of each of its sequences say."""
    kv = taken(codec, kv)
    coded = roundtrip(codec, kv)
    for single, sequence in zip(coded.sequences(), kv.sequences(), strict=True):
        same(single, over_the_wire(codec, sequence))


def check_canonical(codec: Codec, kv: KV) -> None:
    """Coding what was decoded gives the same manifest; equal caches give equal bytes."""
    kv = taken(codec, kv)
    data = pack(codec.encode(kv))
    assert data == pack(codec.encode(kv))
    again = codec.encode(decode(unpack(data), kv.geometry))
    assert [s.type for s in again.segments] == [s.type for s in unpack(data).segments]
    manifests = (
        [s for s in frame.segments if s.type < SegmentType.WEIGHTS] for frame in (again, unpack(data))
    )
    assert next(manifests) == next(manifests)


def check_cap(codec: Codec, kv: KV) -> None:
    """A cap is kept to the byte or refused with the cap that would do."""
    size = len(pack(codec.encode(kv)))
    assert len(pack(codec.encode(kv, max_bytes=size))) <= size
    with pytest.raises(BudgetTooSmall) as caught:
        codec.encode(kv, max_bytes=10)
    smallest = caught.value.smallest_bytes
    assert 10 < len(pack(codec.encode(kv, max_bytes=smallest))) <= smallest
    with pytest.raises(BudgetTooSmall):
        codec.encode(kv, max_bytes=smallest - 1)


def check_errors(codec: Codec) -> None:
    """Batches, broken numbers, half-kept tokens and foreign senders are refused by name."""
    kv = cache(RAGGED)
    for space in {"content", "rotated"} - {*codec.spaces}:
        with pytest.raises(WrongKeySpace, match=space):
            codec.encode(replace(kv, space=space))
    with pytest.raises(ShapeMismatch, match="batch of 2"):
        codec.encode(cache(n_batch=2))
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = cache(RAGGED)
        broken.groups[1].values[0, 0, 0, 4, 1] = bad
        with pytest.raises(NotFinite, match="value at layer 1, head 0, token 4"):
            codec.encode(broken)
    half = Plan.everything(kv)
    half.classes[2, 1, 3] = 0
    with pytest.raises(UsageError, match="layer 2, token 3"):
        codec.encode(kv, half)
    with pytest.raises(ShapeMismatch, match="plan"):
        codec.encode(kv, Plan(half.classes[:1]))
    frame = codec.encode(kv)
    foreign = (
        geometry(RAGGED, model="ee"),
        replace(kv.geometry, tokenizer="ee" * 32),
        geometry(RAGGED[::-1]),
    )
    for sender in foreign:
        with pytest.raises(ForeignModel):
            decode(frame, sender)
