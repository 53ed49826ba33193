"""The aligner between a model and itself."""

from dataclasses import replace
from typing import ClassVar

from kvferry.align.contract import Aligner, Contract
from kvferry.kv import KV


class Identity(Aligner):
    """Passes content-space caches on unchanged. Not fitted, so it covers every codec."""

    name: ClassVar[str] = "identity"

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract)

    def require_codec(self, spec: str) -> None:
        """Nothing was fitted, so nothing can be outside of what it was fitted under."""

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return replace(kv, geometry=self.contract.receiver)
