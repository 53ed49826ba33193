"""Heads side by side as one vector per token, and back."""

from jaxtyping import Float
from torch import Tensor

from kvferry.errors import ShapeMismatch


def flatten_kv_heads(states: Float[Tensor, "*batch heads tokens dim"]) -> Float[Tensor, "*batch tokens wide"]:
    """Keys or values with a token's heads in one vector, head by head."""
    return states.transpose(-3, -2).flatten(-2)


def unflatten_kv_heads(
    wide: Float[Tensor, "*batch tokens wide"], heads: int
) -> Float[Tensor, "*batch heads tokens dim"]:
    """The inverse of `flatten_kv_heads` for key/value heads, whose number is not that of the queries.

    Raises `ShapeMismatch` where the heads do not share the channels evenly.
    """
    if heads < 1 or wide.shape[-1] % heads:
        cure = "Give the number of key/value heads"
        raise ShapeMismatch(f"{wide.shape[-1]} channels for {heads} heads", cure=cure)
    return wide.unflatten(-1, (heads, -1)).transpose(-3, -2)
