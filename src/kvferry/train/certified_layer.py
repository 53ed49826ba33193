"""One layer of a receiver: how far its reads can move when an aligner is given coded caches, and how far they did."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import LayerGeometry
from kvferry.metrics.attention import Scores, visible_slots
from kvferry.metrics.attention_bound import output_bound, read_errors
from kvferry.rope import RotarySpec, rotate
from kvferry.train.cases import Asked, Case
from kvferry.train.token_map import TokenMap, receiver_features

_ROUNDING = 1e-5
"""Relative, of keys and values in fp32."""

Figures = Float[Tensor, "figures reads"]


@dataclass(frozen=True)
class LayerCertificate:
    """Errors and bounds of a layer, each the largest over tokens, heads and reads.

    `lipschitz_*`: of the layer's keys or values, in the sender tokens side by side; `sequence_*`: an upper bound over
    whole sequences (None for a map that is not affine). `shift`: half the range of the errors in a softmax's arguments.
    `broken`: reads that moved more than a bound says (there are none). `vacuous_*`: share of reads whose bound is no
    less than `trivial`, which any two reads of values of that size keep.
    """

    layer: int
    lipschitz_k: float
    lipschitz_v: float
    sequence_k: float | None
    sequence_v: float | None
    key_error: float
    key_bound: float
    value_error: float
    value_bound: float
    shift: float
    shift_bound: float
    total_variation: float
    moved: float
    given: float
    certified: float
    trivial: float
    n_reads: int
    broken: int
    vacuous_given: float
    vacuous_certified: float

    @property
    def ratio(self) -> float | None:
        """How many times the certified bound is what was measured; None where nothing moved."""
        return self.certified / self.moved if self.moved else None


@dataclass(frozen=True)
class Layer:
    """A layer of the receiver with the Lipschitz constants of what is mapped into each of its heads."""

    index: int
    geometry: LayerGeometry
    scores: Scores
    norm_k: Float[Tensor, " heads"]
    norm_v: Float[Tensor, " heads"]


def certify_layer(
    index: int,
    scores: Scores,
    through: TokenMap,
    cases: Sequence[Case],
    input_errors: Sequence[Float[Tensor, "batch tokens"]],
) -> LayerCertificate:
    """Bounds and measurements over all cases; `input_errors` are the norms of what the codec did to each token."""
    geometry = cases[0].mapped.kv.geometry
    keys, values = receiver_features(geometry, index)
    norms = [
        torch.tensor([through.norm(head) for head in part], dtype=torch.float64) for part in (keys, values)
    ]
    layer = Layer(index, geometry.layers[index], scores, *norms)
    pairs = list(zip(cases, input_errors, strict=True))
    figures = torch.cat([_reads(layer, case, error) for case, error in pairs], -1)
    wrong = torch.stack([_slot_errors(case, index) for case in cases]).amax(0)
    worst = max(float(error.max()) for error in input_errors)
    shift, shift_bound, variation, moved, given, certified, trivial = figures
    return LayerCertificate(
        layer=index,
        lipschitz_k=through.norm(keys.flatten()),
        lipschitz_v=through.norm(values.flatten()),
        sequence_k=through.sequence_norm(keys.flatten()),
        sequence_v=through.sequence_norm(values.flatten()),
        key_error=float(wrong[0]),
        key_bound=worst * float(norms[0].max()),
        value_error=float(wrong[1]),
        value_bound=worst * float(norms[1].max()),
        shift=float(shift.max()),
        shift_bound=float(shift_bound.max()),
        total_variation=float(variation.max()),
        moved=float(moved.max()),
        given=float(given.max()),
        certified=float(certified.max()),
        trivial=float(trivial.max()),
        n_reads=figures.shape[1],
        broken=int((moved > torch.minimum(given, certified) * (1 + _ROUNDING) + _ROUNDING * trivial).sum()),
        vacuous_given=float((given >= trivial).double().mean()),
        vacuous_certified=float((certified >= trivial).double().mean()),
    )


def rotary_gain(spec: RotarySpec, key_dim: int, call_length: int = 0) -> float:
    """How much longer rotation makes a key at most: 1, an isometry, unless the spec scales what it turns (yarn).

    >>> rotary_gain(RotarySpec("half", dim=2, inv_freq=(1.0,), scaling=0.5), key_dim=4)
    1.0
    """
    if spec.style == "none":
        return 1.0
    scaling = abs(spec.for_call(call_length).scaling)
    return scaling if spec.dim == key_dim else max(1.0, scaling)


def _reads(layer: Layer, case: Case, input_error: Float[Tensor, "batch tokens"]) -> Figures:
    """By read: shift, its bound, total variation, how far it moved, both bounds, and the trivial one."""
    asked, geometry = case.mapped, layer.geometry
    visible = visible_slots(geometry, asked.kv.present[layer.index], asked.kv.positions[0], asked.positions)
    queries = asked.queries[layer.index].double()
    clean, coded = (_rotated(one, layer) for one in (asked, case.mapped_coded))
    found = read_errors(queries, clean, coded, visible, layer.scores)
    worst = (input_error.unsqueeze(1) * visible).amax(-1).unsqueeze(1)
    share = queries.shape[1] // geometry.heads
    norm_k, norm_v = (
        part.to(worst.device).repeat_interleave(share).view(1, -1, 1) for part in (layer.norm_k, layer.norm_v)
    )
    steepness = layer.scores.scale * rotary_gain(geometry.rotary, geometry.key_dim, asked.kv.call_length)
    shift_bound = abs(steepness) * queries.norm(dim=-1) * norm_k * worst
    certified = output_bound(shift_bound, norm_v * worst, found.radius)
    parts = (
        found.shift,
        shift_bound,
        found.total_variation,
        found.moved,
        found.bound,
        certified,
        found.trivial,
    )
    asks = (asked.mask & visible.any(-1)).unsqueeze(1).expand_as(found.moved)
    return torch.stack([part[asks] for part in parts])


def _rotated(asked: Asked, layer: Layer) -> tuple[Tensor, Tensor]:
    keys, values = asked.kv.layer(layer.index)
    turned = rotate(keys, asked.kv.positions, layer.geometry.rotary, asked.kv.call_length)
    return turned.double(), values.double()


def _slot_errors(case: Case, index: int) -> Float[Tensor, "2"]:
    """The largest error of a key and of a value of any head, in content space."""
    present = case.mapped.kv.present[index].unsqueeze(1)
    pairs = zip(case.mapped.kv.layer(index), case.mapped_coded.kv.layer(index), strict=True)
    return torch.stack([((coded - clean).norm(dim=-1) * present).amax() for clean, coded in pairs])
