"""The ideal length of a message: what the frozen tables say, without headers, lanes and rounding to bytes."""

from kvferry.codec.ecsq.message import Message
from kvferry.codec.ecsq.part import Coded
from kvferry.codec.ecsq.side import Side, write_side
from kvferry.codec.entropy.symbols import Raw, cost_bits, split
from kvferry.codec.estimate import Estimate


def ideal(message: Message, step: int) -> Estimate:
    """The bytes of the parts of a message at a step: numbers, and the levels and means that are sent with them."""
    coded = sum(_part_bits(part) for part in message.at(step).coded)
    plans = (message.scheme.plan(one, step) for one in message.measured if one.part.blocks)
    sides = sum(_side_bits(side) for side, _ in plans if side is not None)
    return Estimate((coded - sides) / 8, sides / 8)


def _part_bits(part: Coded) -> float:
    coded = sum(cost_bits(symbols, rows) for rows, symbols in part.runs)
    return 8 * len(part.head) + coded + _raw_bits(part.raw)


def _side_bits(side: Side) -> float:
    head, numbers, rows = write_side(side)
    symbols, raw = split(numbers, rows)
    return 8 * len(head) + cost_bits(symbols, rows) + _raw_bits(raw)


def _raw_bits(raw: Raw) -> int:
    return int(raw.widths.sum())
