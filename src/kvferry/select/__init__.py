"""Selectors: what the sender holds and saw, to a `Plan` of what to send. `SELECTORS` is light.

>>> SELECTORS.parse("back(proportion=0.5)").brief()
'back(proportion=0.5)'
"""

from kvferry.select.table import SELECTORS

__all__ = ["SELECTORS"]
