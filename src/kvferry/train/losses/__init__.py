"""What a mapped cache is compared with: the receiver's own entries, what its queries read, what it predicts.

Each loss is its configuration; `over_cache` (in `base`) compares two caches by any of them.

>>> LOSSES.parse("hybrid(mercator_weight=0.5, schedule=cosine)").brief()
'hybrid(mercator_weight=0.5, schedule=cosine)'
"""

from kvferry.train.losses.table import LOSSES

__all__ = ["LOSSES"]
