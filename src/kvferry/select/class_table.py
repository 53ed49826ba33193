"""What each precision class of each slot loses and takes, and what is lost of a slot that is not sent."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvferry.errors import NotFinite
from kvferry.kv import KV, Menu, Plan

PerSlot = Float[Tensor, "layers 2 slots"]
Moves = Int[Tensor, "layers 2"]
"""How many classes each layer's keys and values lie above the row of classes that all share."""


@dataclass(frozen=True)
class ClassTable:
    """Losses and bits of every class of every slot, layer by layer, and which slots may be sent."""

    classes: Int[Tensor, " classes"]
    lost: Float[Tensor, "classes layers 2 slots"]
    bits: Float[Tensor, "classes layers 2 slots"]
    dropped: Float[Tensor, " slots"]
    """What is lost of a slot that is not sent: all in which it is unlike the mean slot."""
    held: Bool[Tensor, "layers slots"]
    stepped: bool
    """A step will be chosen after the classes; otherwise classes decide what the numbers take."""

    @classmethod
    def of(cls, kv: KV, menu: Menu, counts: PerSlot, held: Bool[Tensor, "layers slots"]) -> "ClassTable":
        """Of a codec's menu, a squared error of 1 on it counting so much; `NotFinite` for a count that is no number."""
        if not bool(counts.isfinite().all()):
            raise NotFinite(
                "an importance is NaN or infinite", cure="Check the model's dtype: fp16 overflows"
            )
        lost, bits = (torch.stack([x.sum(2) for x in each], 1) for each in (menu.error, menu.bits))
        unlike = _unlike(kv, menu)
        if not menu.units:
            # Without steps nothing says how layers compare: each counts by its own deviation.
            spread = unlike.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            counts = counts / spread
        here = held[None, :, None]
        lost, bits = (lost * counts).masked_fill(~here, 0.0), bits.masked_fill(~here, 0.0)
        dropped = (unlike * counts).masked_fill(~held.unsqueeze(1), 0.0).sum((0, 1))
        classes = torch.tensor(menu.classes, device=held.device)
        return cls(classes, lost, bits, dropped, held, bool(menu.units))

    def without_dropping(self) -> "ClassTable":
        """Every slot that may be sent is sent: to drop one loses more than anything."""
        return replace(self, dropped=self.dropped.masked_fill(self.held.any(0), torch.inf))

    def thinned(self, grain: int) -> "ClassTable":
        """With every so many classes only: what is saved in sets of tokens may be worth more than fine choices."""
        return replace(self, classes=self.classes[::grain], lost=self.lost[::grain], bits=self.bits[::grain])

    def options(self, moves: Moves) -> tuple[Tensor, Tensor]:
        """Losses and bits `[slots, 1 + classes]` of each slot: dropped, or sent in each class moved by its rows."""
        row = self._row(moves)
        lost, bits = (self._moved(table, row) for table in (self.lost, self.bits))
        dropped = self.dropped.unsqueeze(1)
        return torch.cat([dropped, lost], 1), torch.cat([torch.zeros_like(dropped), bits], 1)

    def best_moves(self, choice: Int[Tensor, " slots"], slope: float) -> Moves:
        """For each row the move that is best for these classes of the slots."""
        n = len(self.classes)
        total = (self.lost + slope * self.bits).masked_fill(choice == 0, 0.0)
        moves = torch.arange(n, device=choice.device).unsqueeze(1)
        index = (choice.clamp(min=1) - 1 + moves).clamp(max=n - 1)
        return total.gather(0, index[:, None, None].expand_as(total)).sum(-1).argmin(0)

    def plan(self, choice: Int[Tensor, " slots"], moves: Moves) -> Plan:
        """The classes of a choice among `options`."""
        row = (choice.clamp(min=1) - 1).expand(*moves.shape, -1) + moves.unsqueeze(-1)
        classes = self.classes[row.clamp(max=len(self.classes) - 1)]
        kept = (choice > 0) & self.held.unsqueeze(1)
        return Plan(torch.where(kept, classes, 0).to(torch.uint8))

    def _row(self, moves: Moves) -> Int[Tensor, "classes layers 2"]:
        n = len(self.classes)
        return (torch.arange(n, device=moves.device)[:, None, None] + moves).clamp(max=n - 1)

    def _moved(self, table: Tensor, row: Int[Tensor, "classes layers 2"]) -> Float[Tensor, "slots classes"]:
        return table.gather(0, row.unsqueeze(-1).expand_as(table)).sum((1, 2)).T


def _unlike(kv: KV, menu: Menu) -> PerSlot:
    """Squared distance of each slot from the mean one, in the menu's units."""
    found = []
    for layer in range(kv.geometry.n_layers):
        held = kv.present[layer, 0][:, None]
        for which, numbers in enumerate(kv.layer(layer)):
            own = numbers[0].float()
            mean = (own * held).sum(1, keepdim=True) / held.sum().clamp(min=1)
            unit = menu.units[layer][which].unsqueeze(1) if menu.units else 1.0
            found.append(((own - mean) / unit).square().sum((0, 2)))
    return torch.stack(found).unflatten(0, (-1, 2))
