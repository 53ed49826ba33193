"""A cache to the bytes of a message and back, in two small classes for those who need neither models nor a link."""

import torch

from kvferry.codec import CODECS, Codec, decode
from kvferry.errors import BadSpec, UnknownName
from kvferry.kv import KV, Geometry
from kvferry.wire import DEFAULT_LIMITS, Limits, pack, unpack

QUANTIZATIONS = {
    "ecsq": "ecsq",
    "fp32": "raw(dtype=float32)",
    "fp16": "raw(dtype=float16)",
    "bf16": "raw(dtype=bfloat16)",
    "fp8": "fp8(format=e4m3)",
    "int8": "int(bits=8)",
    "int4": "int(bits=4)",
    "nf4": "nf4",
}
COMPRESSIONS = ("none", "zstd")
_ZSTD_LEVEL = 3


class TokenEncoder:
    """Caches of one sequence to messages. `quantization` is one of `QUANTIZATIONS` or any codec's spec.

    Keys and values are packed as what they are named: "fp8" is E4M3 and not int8, 4 bits are half a byte, and
    nothing is pickled. `compression` adds zstd behind the fixed-rate codecs.

    >>> TokenEncoder("fp8", "zstd").codec
    fp8(format=e4m3, group=0, axis=head, scale=bfloat16, zstd=3)
    """

    def __init__(self, quantization: str = "ecsq", compression: str = "none") -> None:
        if compression not in COMPRESSIONS:
            raise UnknownName("compression", compression, COMPRESSIONS)
        self.codec = _compressed(CODECS.parse(QUANTIZATIONS.get(quantization, quantization)), compression)

    def encode(self, kv: KV, max_bytes: int | None = None) -> bytes:
        """The message, of at most `max_bytes`; raises what `Codec.encode` raises."""
        return pack(self.codec.encode(kv, max_bytes=max_bytes))


class TokenDecoder:
    """Messages of one sender back to caches, float32."""

    def __init__(
        self, geometry: Geometry, limits: Limits = DEFAULT_LIMITS, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry, self.limits, self.device = geometry, limits, device

    def decode(self, data: bytes) -> KV:
        """The cache; a `WireError` or `ContractError` for bytes that are none of this sender's."""
        return decode(unpack(data, self.limits), self.geometry, self.limits, self.device)


def _compressed(codec: Codec, compression: str) -> Codec:
    if compression == "none":
        return codec
    if "zstd" not in codec.config():
        raise BadSpec(f"zstd behind {codec.name}", cure=f"{codec.name} is entropy coded already: use none")
    return CODECS.from_json({**codec.to_json(), "zstd": _ZSTD_LEVEL})
