"""Slots that differ most from what the receiver holds of them itself."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import ShapeMismatch, UsageError
from kvferry.kv import KV
from kvferry.select.contract import TokenSelector
from kvferry.select.receiver_space import as_seen, distance, of_sender
from kvferry.select.sight import Sight


@dataclass(frozen=True, repr=False)
class OracleDelta(TokenSelector):
    """Keeps the slots whose mapped keys and values lie furthest from the receiver's own, `Sight.base`.

    An oracle: the sender has the receiver's cache for free. It says how much knowing it could bring at most.

    >>> OracleDelta(proportion=0.5).brief()
    'oracle_delta(proportion=0.5)'
    """

    name: ClassVar[str] = "oracle_delta"

    def score(self, sight: Sight) -> Float[Tensor, "layers slots"]:
        seen = as_seen(sight)
        base = _base(sight, seen)

        def sizes(layer: int) -> list[Float[Tensor, " slots"]]:
            parts = zip(seen.layer(layer), base.layer(layer), strict=True)
            return [distance(part[0], own[0]) for part, own in parts]

        return of_sender(sight, seen, sizes)


def _base(sight: Sight, seen: KV) -> KV:
    if sight.base is None:
        cure = "Hand in Sight.base, or choose delta, which needs nothing of the receiver"
        raise UsageError("oracle_delta compares with the receiver's own cache, and there is none", cure=cure)
    base = sight.base
    if (base.n_tokens, base.geometry.layers) != (seen.n_tokens, seen.geometry.layers):
        what = f"the receiver's own cache has {base.n_tokens} slots in {base.geometry.n_layers} layers"
        cure = (
            f"The readout has {seen.n_tokens} in {seen.geometry.n_layers}: give the same slots and geometry"
        )
        raise ShapeMismatch(what, cure=cure)
    return base
