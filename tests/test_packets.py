"""Datagrams: a message comes back whole whatever the link does to its pieces, or not at all, within bounded memory."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import forge
from kvferry.errors import (
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    Truncated,
    UnsupportedVersion,
    UsageError,
    WireError,
)
from kvferry.wire import (
    MIN_DATAGRAM_BYTES,
    Datagram,
    Frame,
    Limits,
    MessageKind,
    Reassembly,
    Segment,
    SegmentType,
    cut,
    pack,
    read_datagram,
    text_frame,
    unpack_prefix,
)

quick = settings(max_examples=40, deadline=None)


def message(*layers: bytes, short: bool = False, key: bytes | None = None) -> bytes:
    payload = [Segment(SegmentType.PAYLOAD, layer) for layer in layers]
    return pack(
        Frame(MessageKind.KV, short=short, segments=(Segment(SegmentType.SPEC, b"raw"), *payload)), key
    )


LAYERS = st.lists(st.binary(max_size=120), max_size=4)
SIZES = st.integers(MIN_DATAGRAM_BYTES, 150)
ONE = message(bytes(range(200)), b"second")


def raw(body: bytes = b"x", **fields: object) -> bytes:
    """A datagram by the letter of docs/format.md."""
    honest = {"magic": b"\x89D", "version": 1, "priority": 0, "message_id": 7, "index": 0, "count": 2}
    start = struct.pack("<2sBBIII", *{**honest, **fields}.values())
    return start + forge.low32(start + body) + body


@quick
@given(layers=LAYERS, short=st.booleans(), size=SIZES, chance=st.randoms(use_true_random=False))
def test_any_order_and_duplicates(layers, short, size, chance):
    data = message(*layers, short=short)
    sent = cut(data, size, message_id=3)
    assert max(map(len, sent)) <= size
    order = sent + chance.choices(sent, k=len(sent))
    chance.shuffle(order)
    reassembly = Reassembly()
    came = [whole for whole in map(reassembly.add, order) if whole is not None]
    assert came == [data]
    assert reassembly.in_flight == ()


@quick
@given(layers=LAYERS, short=st.booleans(), size=SIZES, chance=st.randoms(use_true_random=False))
def test_losses_are_named_and_leave_a_prefix(layers, short, size, chance):
    data = message(*layers, short=short)
    sent = cut(data, size, message_id=3)
    lost = sorted(chance.sample(range(len(sent)), chance.randint(1, len(sent))))
    reassembly = Reassembly()
    kept = [datagram for index, datagram in enumerate(sent) if index not in lost]
    assert [reassembly.add(datagram) for datagram in kept] == [None] * len(kept)
    if not kept:
        return
    assert [index for gap in reassembly.missing(3) for index in gap] == lost
    assert reassembly.prefix(3) == b"".join(read_datagram(one).piece for one in sent[: lost[0]])
    assert data.startswith(reassembly.prefix(3))
    assert [reassembly.add(sent[index]) for index in lost][-1] == data


@quick
@given(one=LAYERS, other=LAYERS, size=SIZES, chance=st.randoms(use_true_random=False))
def test_two_messages_interleaved(one, other, size, chance):
    one, other = message(*one), message(*other)
    order = cut(one, size, message_id=1) + cut(other, size, message_id=2)
    chance.shuffle(order)
    reassembly = Reassembly()
    came = [whole for whole in map(reassembly.add, order) if whole is not None]
    assert sorted(came) == sorted([one, other])


def test_what_is_lost_at_the_end_leaves_whole_segments():
    sent = cut(ONE, 100, message_id=1)
    reassembly = Reassembly()
    for datagram in sent[:-1]:
        reassembly.add(datagram)
    prefix = unpack_prefix(reassembly.prefix(1))
    assert [segment.body for segment in prefix.frame.segments] == [b"raw", bytes(range(200)), b"second"]
    assert prefix.missing


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("key", [None, bytes(16)])
def test_priorities_do_not_mix(short, key):
    data = message(bytes(300), bytes(5), bytes(300), short=short, key=key)
    sent = [read_datagram(datagram) for datagram in cut(data, 120, 1, priorities=[2, 2, 9])]
    runs = {
        rank: b"".join(one.piece for one in sent if one.priority == rank and one.index < len(sent) - 1)
        for rank in (0, 2, 9)
    }
    end = sent[-1]
    start = (24 if short else 64) + 10
    assert (end.priority, data.endswith(end.piece)) == (0, True)
    assert [len(runs[0]), len(runs[2]), len(runs[9])] == [start, 308 + 12, 308]
    assert [one.index for one in sent] == list(range(len(sent)))


def test_text_has_the_first_priority():
    assert {read_datagram(one).priority for one in cut(pack(text_frame(400 * "x")), 90, 1)} == {0}


def test_overhead_is_20_bytes_a_datagram():
    sent = cut(ONE, 50, message_id=1)
    assert sum(map(len, sent)) == len(ONE) + 20 * len(sent)
    assert len(cut(ONE, MIN_DATAGRAM_BYTES, 1)) == len(ONE)


def test_a_datagram_from_the_specification_alone_is_ours():
    assert raw() == raw(b"x")
    assert read_datagram(raw(b"abc", priority=5, index=1)) == Datagram(7, 5, 1, 2, b"abc")
    (only,) = cut(pack(text_frame("hi")), 200, message_id=2**32 - 1)
    assert only == raw(pack(text_frame("hi")), message_id=2**32 - 1, count=1)


USES = {
    "too small": (ONE, {"max_bytes": 20, "message_id": 1}, UsageError),
    "id too large": (ONE, {"max_bytes": 99, "message_id": 2**32}, UsageError),
    "id negative": (ONE, {"max_bytes": 99, "message_id": -1}, UsageError),
    "too few priorities": (ONE, {"max_bytes": 99, "message_id": 1, "priorities": [1]}, UsageError),
    "priority 0": (ONE, {"max_bytes": 99, "message_id": 1, "priorities": [0, 1]}, UsageError),
    "priority 256": (ONE, {"max_bytes": 99, "message_id": 1, "priorities": [1, 256]}, UsageError),
    "not a message": (bytes(99), {"max_bytes": 99, "message_id": 1}, Malformed),
    "half a message": (ONE[:-1], {"max_bytes": 99, "message_id": 1}, Truncated),
}


@pytest.mark.parametrize(("data", "options", "error"), USES.values(), ids=USES)
def test_what_cannot_be_cut(data, options, error):
    with pytest.raises(error) as caught:
        cut(data, **options)
    assert caught.value.cure


def test_every_truncation_and_every_flipped_bit():
    (first, *_) = cut(ONE, 60, message_id=1)
    reassembly = Reassembly()
    for length in range(len(first)):
        with pytest.raises(WireError):
            reassembly.add(first[:length])
    for bit in range(8 * len(first)):
        bad = bytearray(first)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            reassembly.add(bad)
    assert reassembly.in_flight == ()


BAD = {
    "nothing": (b"", Truncated),
    "no piece": (raw(b""), Truncated),
    "another magic": (raw(magic=b"\x89E"), Malformed),
    "a message": (ONE, Malformed),
    "another version": (raw(version=2), UnsupportedVersion),
    "version 0": (raw(version=0), UnsupportedVersion),
    "index beyond the count": (raw(index=2), Malformed),
    "last index": (raw(index=2**32 - 1), Malformed),
    "count 0": (raw(count=0), Malformed),
    "4 G pieces": (raw(count=2**32 - 1), LimitExceeded),
    "damaged": (raw()[:-1] + b"y", ChecksumMismatch),
}


@pytest.mark.parametrize(("datagram", "error"), BAD.values(), ids=BAD)
def test_datagrams_that_are_refused(datagram, error):
    reassembly = Reassembly()
    with pytest.raises(error) as caught:
        reassembly.add(datagram)
    assert caught.value.cure
    assert reassembly.in_flight == ()


CONTRADICTIONS = {
    "count": raw(b"b", index=1, count=3),
    "piece": raw(b"b"),
    "priority": raw(b"a", priority=1),
}


@pytest.mark.parametrize("datagram", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused_and_the_first_stands(datagram):
    reassembly = Reassembly()
    reassembly.add(raw(b"a"))
    with pytest.raises(Malformed, match="contradicts"):
        reassembly.add(datagram)
    assert reassembly.add(raw(b"b", index=1)) == b"ab"


def test_late_duplicates_of_what_is_done_are_ignored():
    reassembly = Reassembly()
    assert reassembly.add(raw(b"a", count=1)) == b"a"
    assert reassembly.add(raw(b"b", count=1)) is None
    assert reassembly.in_flight == ()
    for number in range(8, 8 + 1024):
        assert reassembly.add(raw(b"a", message_id=number, count=1))
    assert reassembly.add(raw(b"c", count=1)) == b"c"


def test_a_message_given_up_is_forgotten():
    reassembly = Reassembly(Limits(max_in_flight=1))
    reassembly.add(raw())
    with pytest.raises(LimitExceeded, match="2 messages in flight"):
        reassembly.add(raw(message_id=8))
    reassembly.drop(7)
    assert reassembly.add(raw(index=1)) is None
    reassembly.add(raw(message_id=8))
    assert reassembly.in_flight == (8,)
    for call in (reassembly.missing, reassembly.prefix, reassembly.drop):
        with pytest.raises(UsageError, match="7 is not in flight"):
            call(7)


def test_memory_is_bounded_whatever_comes():
    limits = Limits(max_bytes=100_000)
    reassembly = Reassembly(limits)
    tracemalloc.start()
    refused = 0
    try:
        for index in range(3000):
            try:
                reassembly.add(raw(b"x", message_id=index % 50, index=index // 50, count=700))
            except LimitExceeded:
                refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused > 2000
    assert peak < 4 * limits.max_bytes
    assert len(reassembly.missing(0)) == 1
    for number in reassembly.in_flight:
        reassembly.drop(number)
    assert reassembly.add(raw(b"x", message_id=99, count=1)) == b"x"
