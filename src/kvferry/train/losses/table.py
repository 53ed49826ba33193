"""Every loss, by the name that a spec gives it."""

from typing import TYPE_CHECKING

from kvferry.spec import Table

if TYPE_CHECKING:
    from kvferry.train.losses.base import KVLoss

LOSSES: "Table[KVLoss]" = Table(
    "loss",
    {
        "cosine": "kvferry.train.losses.cosine:CosineLoss",
        "hybrid": "kvferry.train.losses.hybrid:HybridKVLoss",
        "mercator": "kvferry.train.losses.mercator:MercatorKVLoss",
        "structural": "kvferry.train.losses.structural:StructuralKVLoss",
        "three_term": "kvferry.train.losses.three_term:ThreeTermLoss",
        "whitened_mse": "kvferry.train.losses.whitened_mse:WhitenedMSE",
    },
)
