"""The first slots, on which attention rests, and the last ones."""

from dataclasses import dataclass, field
from typing import ClassVar

from kvferry.select.back import Back


@dataclass(frozen=True, repr=False)
class SinksRecent(Back):
    """Keeps a few slots at the start and the end of the text (Xiao et al., StreamingLLM, arXiv:2309.17453).

    The attention sink is the first token of the whole prompt. A receiver that reads a head of its own has one
    already, so here the sinks are the first slots of the text.

    >>> SinksRecent(sinks=2).brief()
    'sinks_recent(sinks=2)'
    """

    name: ClassVar[str] = "sinks_recent"
    sinks: int = field(default=4, kw_only=True)
