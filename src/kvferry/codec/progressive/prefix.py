"""Decoding what has come of a message so far."""

from collections.abc import Sequence

import torch

from kvferry.codec.base import decode
from kvferry.errors import Truncated
from kvferry.kv import KV, Geometry
from kvferry.wire import DEFAULT_LIMITS, Agreement, Limits, SegmentType, unpack_prefix


def decode_prefix(
    data: bytes | bytearray | memoryview,
    geometry: Geometry,
    limits: Limits = DEFAULT_LIMITS,
    device: torch.device | str = "cpu",
    agreements: Sequence[Agreement] = (),
) -> KV:
    """The cache that the first bytes of a `progressive` message carry; see `decode` for what it raises.

    `Truncated` as long as no PAYLOAD has come whole: what stands before it says which tokens there are.
    """
    prefix = unpack_prefix(data, limits, agreements)
    if not prefix.frame.bodies(SegmentType.PAYLOAD):
        raise Truncated(f"{len(data)} bytes and no PAYLOAD", cure="Read on to the end of the first")
    return decode(prefix.frame, geometry, limits, device)
