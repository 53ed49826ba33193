"""What a fuser owes: the receiver's own cache and one that arrived, made into one.

Rule 1: a fuser is for two models. It states both geometries and refuses caches of others.
Rule 2: it states the key space that it works in; whoever calls it (`fuse.residual`, `models.enrich`) rotates for it.
Rule 3: it gives either a *residual*, which is added to the receiver's own cache, or a whole *cache*, to be injected.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import nn

from kvferry.errors import CodecNotCovered, ForeignModel, GridMismatch, UsageError
from kvferry.kv import KV, Geometry, KeySpace

Gives = Literal["residual", "cache"]


class Fuser(nn.Module, ABC):
    """(own KV, arrived KV) -> KV of the receiver's geometry. Kept as a folder, see `kvferry.fuse.folder`."""

    name: ClassVar[str]
    space: ClassVar[KeySpace] = "content"
    gives: ClassVar[Gives] = "residual"

    coded_with: tuple[str, ...] = ()
    """The codecs that it was trained under; empty for one that knows none and takes what comes."""

    def __init__(self, sender: Geometry, receiver: Geometry) -> None:
        super().__init__()
        self.sender, self.receiver = sender, receiver

    def require_codec(self, codec: str) -> None:
        """Raise `CodecNotCovered` for a cache that came in a codec which the fuser never saw."""
        if self.coded_with and codec not in self.coded_with:
            cure = f"Code with {' or '.join(self.coded_with)}, or fit a fuser under this one too"
            raise CodecNotCovered(f"the fuser was not trained under {codec}", cure=cure)

    def options(self) -> dict[str, Any]:
        """What the constructor takes beside the geometries, as JSON."""
        return {}

    def start(self, own: KV, arrived: KV) -> None:
        """Take what can be known before training from caches of some hundred texts. For most it means nothing."""

    def anneal(self, progress: float) -> None:
        """Say how far training is, from 0 to 1. Fusers with soft gates harden them; for others it means nothing."""
        if not 0 <= progress <= 1:
            raise UsageError(f"progress is {progress}", cure="Give the share of training done, from 0 to 1")

    def require_models(self, own: KV, arrived: KV) -> None:
        """Raise `ForeignModel` for caches of other models, `WrongKeySpace` for keys of the other space."""
        for what, kv, want in (("own", own, self.receiver), ("arrived", arrived, self.sender)):
            kv.require_space(self.space)
            if kv.geometry.model != want.model:
                got = f"the {what} cache is of model {kv.geometry.model[:16]}, {want.model[:16]} was fitted"
                raise ForeignModel(got, cure="Fit a fuser for this pair")

    def require_same_tokens(self, own: KV, arrived: KV) -> None:
        """Raise `GridMismatch` unless slot t of one stands for slot t of the other."""
        if (own.n_batch, own.n_tokens) != (arrived.n_batch, arrived.n_tokens):
            got = f"{arrived.n_batch} x {arrived.n_tokens} slots arrived for {own.n_batch} x {own.n_tokens}"
            raise GridMismatch(got, cure="Pool the arrived cache to the receiver's tokens (grid=receiver)")

    @abstractmethod
    def forward(self, own: KV, arrived: KV) -> KV:
        """The residual or the cache, both caches being in `space`. Raises what the two checks above raise."""
