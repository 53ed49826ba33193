"""The table of selectors. One line per selector; one file per selector beside it."""

from typing import TYPE_CHECKING

from kvferry.spec import Table

if TYPE_CHECKING:
    from kvferry.select.contract import Selector

SELECTORS: "Table[Selector]" = Table(
    "selector",
    {
        "all": "kvferry.select.all:All",
        "back": "kvferry.select.back:Back",
    },
)
