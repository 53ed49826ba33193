"""From a sender's reading to what its receiver is handed, before any codec: the token grid decides the slots."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.align.contract import Grid
from kvferry.align.receiver_grid import on_receiver_grid
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.tokens import encode


@dataclass(frozen=True)
class Route:
    """Two models and the grid on which the first one's caches travel."""

    sender: Model
    receiver: Model
    grid: Grid = "sender"

    def sent(self, contexts: Sequence[str]) -> KV:
        """What the sender holds of the contexts, on the grid."""
        own = text_slots(capture(self.sender, contexts).kv)
        if self.grid == "sender":
            return own
        return on_receiver_grid(own, encode(self.receiver.tokenizer, contexts).spans)

    def held(self, contexts: Sequence[str]) -> KV:
        """What the receiver would hold, had it read the contexts itself."""
        return text_slots(capture(self.receiver, contexts).kv)
