"""The aligner between a model and itself."""

from dataclasses import replace
from typing import ClassVar

from kvferry.align.contract import Unfitted
from kvferry.kv import KV


class Identity(Unfitted):
    """Passes content-space caches on unchanged."""

    name: ClassVar[str] = "identity"

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return replace(kv, geometry=self.contract.receiver)
