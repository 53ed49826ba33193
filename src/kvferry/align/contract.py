"""What an aligner promises, and the base class of all aligners.

A map is only good for the two models, the token grid and the codecs that it was fitted for: fitted on clean caches it
fails under a coarse codec, and the reverse. So these are part of its folder, and a receiver refuses anything else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter
from torch import nn

from kvferry.align.covered import covers
from kvferry.errors import CodecNotCovered, ForeignModel, UsageError
from kvferry.kv import KV, Geometry

Grid = Literal["sender", "receiver"]
SHORTEST_PREFIX = 16
"""Digits of a fingerprint that travel in a frame's header."""


@dataclass(frozen=True)
class Contract:
    """The two geometries, the token grid, the codecs covered, and receiver tokens per sender token."""

    sender: Geometry
    receiver: Geometry
    grid: Grid = "sender"
    coded_with: tuple[str, ...] = ()
    stride: float = 1.0

    def require_sender(self, model: str, tokenizer: str) -> None:
        """Raise `ForeignModel` unless hex fingerprints (or their first 16 digits) are the sender's fitted for."""
        for what, got, want in (
            ("model", model, self.sender.model),
            ("tokenizer", tokenizer, self.sender.tokenizer),
        ):
            if len(got) < SHORTEST_PREFIX or not want.startswith(got):
                cure = "Fit an aligner for this pair: kvferry fit --sender ... --receiver ..."
                raise ForeignModel(
                    f"{what} {got[:16]} sent, the aligner was fitted for {want[:16]}", cure=cure
                )


def to_json(contract: Contract) -> dict[str, Any]:
    return TypeAdapter(Contract).dump_python(contract, mode="json")


def from_json(data: dict[str, Any]) -> Contract:
    return TypeAdapter(Contract).validate_python(data)


class Aligner(nn.Module, ABC):
    """KV(sender) -> KV(receiver). Kept as a folder, see `kvferry.align.folder`."""

    name: ClassVar[str]

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def options(self) -> dict[str, Any]:
        """What the constructor takes beside the contract, as JSON."""
        return {}

    def require_codec(self, spec: str) -> None:
        """Raise `CodecNotCovered` unless the map was fitted under this codec."""
        if not covers(self.contract.coded_with, spec):
            cure = f"Send with one of: {', '.join(self.contract.coded_with)}"
            raise CodecNotCovered(f"codec {spec} is not covered by the aligner", cure=cure)

    @abstractmethod
    def forward(self, kv: KV) -> KV:
        """The same tokens, as the receiver would hold them. Content space in, content space out."""


class Unfitted(Aligner):
    """A map that was fitted under no codec, so that nothing lies outside of what it was fitted under: it covers all."""

    def require_codec(self, spec: str) -> None:
        """Every codec is covered."""


def require_positive(name: str, value: int) -> None:
    """Raise `UsageError` for an option that counts something and is below 1."""
    if value < 1:
        raise UsageError(f"{name} is {value}, out of range", cure="Give at least 1")
