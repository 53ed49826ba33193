"""What each precision class of `ecsq` would cost and lose, slot by slot: every number rounded to every class's step.

Errors are squared and counted in steps of class 1, which is the codec's own measure: steps follow deviations, or the
weights of a profile. Bits are those of the frozen tables; side information and noise shaping are left out.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.codec.classes import MAX_CLASS
from kvferry.codec.ecsq.grid import CLASS_LEVEL, SILENT, Grid
from kvferry.codec.ecsq.layout import Block
from kvferry.codec.ecsq.message import Message
from kvferry.codec.entropy.tables import COST_UNIT, HIGHEST, LOWEST, N_CENTROIDS, tables
from kvferry.kv import KV, Menu

_MANY = 1 << 20
_REACH = 127
"""Larger whole numbers cost as this one does, and two bits for each octave more."""


def menu_of(kv: KV, message: Message, step: int) -> Menu:
    """The menu of a cache that `message` measured, at the step of class 1: all classes, for large ones every second."""
    classes = tuple(range(1, MAX_CLASS + 1, 2 if message.n_numbers > _MANY else 1))
    shapes = [(len(classes), 2, layer.heads, kv.n_tokens) for layer in kv.geometry.layers]
    error, bits = (tuple(torch.zeros(shape) for shape in shapes) for _ in range(2))
    units: dict[tuple[int, int], Tensor] = {}
    slots = torch.from_numpy(np.flatnonzero(kv.present[:, 0].any(0).cpu().numpy()))
    for measured in message.measured:
        if not measured.part.blocks:
            continue
        _, grid = message.scheme.plan(measured, step)
        for block, held, rows in measured.part.row_groups():
            one = _block(message, block, held, grid, rows)
            units[block.layer, block.which] = one.step[:, 0]
            where = slots[torch.from_numpy(held)]
            for index, token_class in enumerate(classes):
                lost, cost = one.coded(token_class)
                error[block.layer][index, block.which][:, where] = lost.sum(-1)
                bits[block.layer][index, block.which][:, where] = cost.sum(-1)
    found = (tuple(x.to(kv.device) for x in each) for each in (error, bits))
    return Menu(classes, *found, units=_by_layer(units, kv))


def _by_layer(units: dict[tuple[int, int], Tensor], kv: KV) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of layers without tokens 1."""
    every = []
    for layer, shape in enumerate(kv.geometry.layers):
        dims = ((0, shape.key_dim), (1, shape.value_dim))
        keys, values = (units.get((layer, which), torch.ones(shape.heads, dim)) for which, dim in dims)
        every.append((keys.to(kv.device), values.to(kv.device)))
    return tuple(every)


@dataclass(frozen=True)
class _Steps:
    """The numbers of a block in steps of class 1, and the level of each channel."""

    size: Float[Tensor, "heads tokens dim"]
    step: Float[Tensor, "heads 1 dim"]
    level: Int[Tensor, "heads 1 dim"]

    def coded(self, token_class: int) -> tuple[Tensor, Tensor]:
        """Squared error and bits of each number in a class."""
        scale = 2.0 ** ((token_class - 1) / 2)
        level = (self.level - CLASS_LEVEL * (token_class - 1)).clamp(min=LOWEST)
        shift = ((level - HIGHEST + 3) // 4).clamp(min=0)
        number = (self.size / scale).round()
        table = (level - 4 * shift - LOWEST).expand(self.size.shape)
        near = (number / 2.0**shift).round()
        cost = _costs()[table, near.clamp(max=_REACH).long()] + shift
        cost = cost + 2 * (near / _REACH).clamp(min=1).log2()
        centred = _centres()[table, number.clamp(max=N_CENTROIDS).long()]
        decoded = torch.where((number < N_CENTROIDS) & (shift == 0), centred, number)
        silent = self.level == SILENT
        lost = torch.where(silent, self.size, decoded * scale - self.size).square()
        return lost, cost.masked_fill(silent, 0.0)


def _block(message: Message, block: Block, held: np.ndarray, grid: Grid, rows: slice) -> _Steps:
    shape = (block.heads, 1, block.dim)
    mean, step, level = (
        torch.from_numpy(each[rows].reshape(shape)) for each in (grid.mean, grid.step, grid.level)
    )
    numbers = torch.from_numpy(np.ascontiguousarray(message.arrays(block)[:, held]))
    return _Steps(((numbers - mean) / step).abs(), step, level)


@cache
def _costs() -> Float[Tensor, "tables sizes"]:
    """Bits of a whole number of either sign; beyond the reach of its table those of its escape."""
    found = tables()
    costs = torch.zeros(len(found.reach), _REACH + 1)
    for table, reach in enumerate(found.reach.tolist()):
        inside = min(reach, _REACH) + 1
        costs[table, :inside] = torch.from_numpy(
            found.cost[table, reach : reach + inside] / COST_UNIT
        ).float()
        beyond = torch.arange(1, _REACH - inside + 2, dtype=torch.float32)
        escape = float(found.cost[table, 2 * reach + 1]) / COST_UNIT
        costs[table, inside:] = escape + 6 + beyond.log2().floor()
    return costs


@cache
def _centres() -> Float[Tensor, "tables sizes"]:
    centroids = torch.from_numpy(tables().centroid)
    return torch.nn.functional.pad(centroids, (0, 1), value=float(N_CENTROIDS))
