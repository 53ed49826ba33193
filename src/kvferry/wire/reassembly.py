"""Datagrams in, messages out. No socket and no clock here.

Rule 1: memory is bounded by the limits, whatever comes.
Rule 2: the first datagram of an index stands; another one that contradicts it is refused.
Rule 3: datagrams carry no seal. A stranger can spoil a message, but not forge one that is sealed.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from kvferry.errors import LimitExceeded, Malformed, UsageError
from kvferry.wire.limits import DEFAULT_LIMITS, Limits
from kvferry.wire.packets import Datagram, read_datagram

PIECE_BYTES = 128
"""What a piece counts for beside its length: its place in memory."""
_REMEMBERED = 1024
"""Messages that are done and whose late duplicates are recognised."""


@dataclass
class _Partial:
    """What has come of one message."""

    count: int
    pieces: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    n_bytes: int = 0


class Reassembly:
    """Datagrams in, whole messages out, whatever their order, however often they come.

    It holds at most `limits.max_in_flight` unfinished messages and at most `limits.max_bytes` bytes of pieces, where
    each piece counts 128 bytes more than it carries. When to give up on a message is the caller's business: `drop`.

    >>> from kvferry.wire import cut, pack, text_frame
    >>> message = pack(text_frame("tea in Oslo"))
    >>> first, second, third = cut(message, 64, message_id=7)
    >>> reassembly = Reassembly()
    >>> reassembly.add(third), reassembly.add(first), reassembly.missing(7)
    (None, None, (range(1, 2),))
    >>> reassembly.add(second) == message
    True
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._partial: dict[int, _Partial] = {}
        self._done: dict[int, None] = {}
        self._n_bytes = 0

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The ids of unfinished messages, oldest first."""
        return tuple(self._partial)

    def add(self, datagram: bytes | bytearray | memoryview) -> bytes | None:
        """The whole message if this datagram was the last one missing, otherwise None.

        Duplicates are ignored. Raises a `WireError` for a damaged datagram, `Malformed` for one that contradicts an
        earlier one, `LimitExceeded` where there is no room; each leaves everything as it was.
        """
        came = read_datagram(datagram)
        if came.message_id in self._done:
            return None
        partial = self._partial.get(came.message_id) or self._begin(came)
        known = partial.pieces.get(came.index)
        if partial.count != came.count or (known and known != (came.priority, came.piece)):
            what = f"datagram {came.index} of {came.count} of message {came.message_id} contradicts an earlier one"
            raise Malformed(what, cure="Give each message an id of its own")
        if known is None:
            self._keep(came, partial)
        if len(partial.pieces) < partial.count:
            return None
        self.drop(came.message_id)
        return b"".join(partial.pieces[index][1] for index in range(partial.count))

    def missing(self, message_id: int) -> tuple[range, ...]:
        """The indices of an unfinished message that have not come; `UsageError` if there is no such message."""
        partial = self._find(message_id)
        edges = [-1, *sorted(partial.pieces), partial.count]
        gaps = (range(low + 1, high) for low, high in pairwise(edges))
        return tuple(gap for gap in gaps if gap)

    def prefix(self, message_id: int) -> bytes:
        """The bytes of an unfinished message up to its first gap, for `unpack_prefix`."""
        pieces = self._find(message_id).pieces
        whole = next((index for index in range(len(pieces) + 1) if index not in pieces), 0)
        return b"".join(pieces[index][1] for index in range(whole))

    def drop(self, message_id: int) -> None:
        """Give an unfinished message up: what has come of it is forgotten, what may still come is ignored."""
        self._n_bytes -= self._find(message_id).n_bytes
        del self._partial[message_id]
        self._done[message_id] = None
        if len(self._done) > _REMEMBERED:
            del self._done[next(iter(self._done))]

    def _find(self, message_id: int) -> _Partial:
        if message_id not in self._partial:
            what = f"message {message_id} is not in flight"
            raise UsageError(what, cure=f"These are: {list(self._partial)}")
        return self._partial[message_id]

    def _begin(self, came: Datagram) -> _Partial:
        self._check(len(self._partial) + 1, self._limits.max_in_flight, "messages in flight", "max_in_flight")
        self._check(came.count * (1 + PIECE_BYTES), self._limits.max_bytes, "bytes in flight", "max_bytes")
        return _Partial(came.count)

    def _keep(self, came: Datagram, partial: _Partial) -> None:
        n_bytes = len(came.piece) + PIECE_BYTES
        self._check(self._n_bytes + n_bytes, self._limits.max_bytes, "bytes in flight", "max_bytes")
        partial.pieces[came.index] = came.priority, came.piece
        partial.n_bytes += n_bytes
        self._n_bytes += n_bytes
        self._partial[came.message_id] = partial

    def _check(self, value: int, limit: int, unit: str, name: str) -> None:
        if value > limit:
            cure = f"Drop a message of {list(self._partial)[:8]} or raise Limits.{name}"
            raise LimitExceeded(f"{value} {unit}, the limit is {limit}", cure=cure)
