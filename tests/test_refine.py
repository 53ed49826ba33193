"""Answers from the first part of a message, and more of it on request: same bytes, same answers, refusals by name."""

import asyncio
from dataclasses import asdict, replace

import pytest

from kvferry.codec import codec_of
from kvferry.errors import BudgetTooSmall, CodecNotCovered, LimitExceeded, Malformed, PeerRefused, UsageError
from kvferry.link import memory_pair
from kvferry.models.zoo.worlds import make_item
from kvferry.session.exchange import Remote, call, converse, greet, serve
from kvferry.session.message import Message, message_of
from kvferry.session.receiver import Receiver
from kvferry.session.refine import Asked, Patience, answer_so_far, piece, read_asked, read_more
from kvferry.session.refine_ask import Refined, ask_refining
from kvferry.session.sender import Sender
from kvferry.wire import MessageKind, SegmentType, json_frame, read_json, unpack, unpack_prefix

ITEM = make_item(3, n_facts=4, n_fillers=1)
NEVER, ALWAYS = 0.0, 1e9
"""Margins that no answer is below, or that every answer is."""


@pytest.fixture(scope="module")
def sender():
    return Sender("llama", codec="progressive")


@pytest.fixture(scope="module")
def receiver():
    return Receiver("llama")


@pytest.fixture(scope="module")
def message(sender):
    return sender.read(ITEM.context)


async def _talk(sender, receiver, message, patience, first_bytes) -> tuple[Refined, Remote]:
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    got = await ask_refining(remote, message, ITEM.question, patience, first_bytes, max_new_tokens=12)
    await remote.close()
    await answering
    return got, remote


def talk(sender, receiver, message, patience, first_bytes=2500) -> tuple[Refined, Remote]:
    return asyncio.run(_talk(sender, receiver, message, patience, first_bytes))


def chunks_end(data: bytes) -> set[int]:
    return {unpack_prefix(data[:n]).n_bytes_used for n in [*range(100, len(data), 7), len(data)]}


def test_an_answer_that_is_sure_takes_the_first_part_alone(sender, receiver, message):
    got, remote = talk(sender, receiver, message, Patience(NEVER, 1000))
    assert (got.rounds, len(got.margins)) == (0, 1)
    assert remote.meter.sent["message"] <= 2500
    prefix = unpack_prefix(piece(message.data, 0, 2500)).frame
    (own,) = answer_so_far(receiver, [prefix], [ITEM.question], max_new_tokens=12)
    assert (own.reply.text, own.margin) == (got.reply.text, pytest.approx(got.margins[0]))


def test_one_that_is_not_gets_all_and_is_the_answer_to_the_whole(sender, receiver, message):
    got, remote = talk(sender, receiver, message, Patience(ALWAYS, len(message), 1))
    whole = receiver.answer(message, ITEM.question, max_new_tokens=12)
    assert (got.reply.text, got.rounds) == (whole.text, 1)
    assert remote.meter.sent["message"] == len(message) - 40 - _end_bytes(message)


def _end_bytes(message: Message) -> int:
    return len(message) - unpack_prefix(message.data[:-1]).n_bytes_used


def test_rounds_end(sender, receiver, message):
    got, remote = talk(sender, receiver, message, Patience(ALWAYS, 600, 2))
    assert (got.rounds, len(got.margins)) == (2, 3)
    assert remote.meter.sent["message"] <= 2500 + 2 * 600
    assert set(remote.meter.received) == {"hello", "answer"}
    assert got.n_bytes_sent == remote.meter.sent["message"] + remote.meter.sent["request"]
    assert got.n_bytes_received == remote.meter.received["answer"] > 300
    assert got.latency_ms > 0


def test_pieces_end_with_segments_and_join_to_the_message(message):
    data, at = message.data, 0
    ends = chunks_end(data)
    while at < len(data):
        one = piece(data, at, 700)
        assert 0 < len(one) <= 700
        at += len(one)
        assert at in ends or len(one) == 700
    assert b"".join([piece(data, 0, 2500), data[len(piece(data, 0, 2500)) :]]) == data


def test_over_tcp_as_in_memory(sender, receiver, message):
    async def talk_by_tcp() -> Refined:
        listener = await serve(receiver, "127.0.0.1", 0)
        remote = await call("127.0.0.1", listener.port, sender.hello())
        got = await ask_refining(
            remote, message, ITEM.question, Patience(ALWAYS, 900), 2500, max_new_tokens=12
        )
        again = await remote.ask([message], [ITEM.question], max_new_tokens=12)
        assert again[0].text == receiver.answer(message, ITEM.question, max_new_tokens=12).text
        await remote.close()
        await listener.close()
        return got

    by_tcp = asyncio.run(talk_by_tcp())
    in_memory, _ = talk(sender, receiver, message, Patience(ALWAYS, 900))
    assert (by_tcp.reply.text, by_tcp.rounds) == (in_memory.reply.text, in_memory.rounds)
    assert by_tcp.margins == pytest.approx(in_memory.margins)


class Older(Receiver):
    """One that says nothing of refining."""

    def welcome(self, hello: Message) -> Message:
        content = read_json(super().welcome(hello).frame)
        del content["refines"]
        return message_of(json_frame(MessageKind.HELLO, content))


def test_a_receiver_that_does_not_refine_is_asked_nothing(sender, receiver, message):
    with pytest.raises(PeerRefused, match="does not refine"):
        talk(sender, Older(receiver.model), message, Patience(1.0, 900))


def test_refusals_before_anything_is_sent(sender, receiver, message):
    with pytest.raises(CodecNotCovered, match="int"):
        talk(sender, receiver, sender.with_codec("int(bits=4)").read(ITEM.context), Patience(1.0, 900))
    with pytest.raises(BudgetTooSmall) as caught:
        talk(sender, receiver, message, Patience(1.0, 900), first_bytes=400)
    least = caught.value.smallest_bytes
    got, _ = talk(sender, receiver, message, Patience(NEVER, 900), first_bytes=least)
    assert got.rounds == 0
    with pytest.raises(BudgetTooSmall):
        talk(sender, receiver, message, Patience(1.0, 900), first_bytes=least - 1)


def test_damage_on_the_way_is_refused_and_the_talk_goes_on(sender, receiver, message):
    """Behind the checksums of a message nothing stays hidden, in pieces neither."""

    async def damaged() -> None:
        near, far = memory_pair()
        answering = asyncio.create_task(converse(receiver, far))
        remote = await greet(near, sender.hello())
        broken = Message(message.data)
        assert codec_of(broken.frame).name == "progressive"
        asked = Asked(ITEM.question, 12, Patience(NEVER, 900), len(message))
        for bad in (
            message.data[:40],
            message.data[:1500] + b"x" + message.data[1501:2500],
            message.data + b"x",
        ):
            await near.send(asked.message().data, "request")
            await near.send(bad, "message")
            frame = unpack(await near.receive("answer"))
            assert frame.kind == MessageKind.ERROR
        (reply,) = await remote.ask([message], [ITEM.question], max_new_tokens=12)
        assert reply.text
        await remote.close()
        await answering

    asyncio.run(damaged())


@pytest.mark.parametrize(
    "wrong", [{"margin": -1.0}, {"more_bytes": 0}, {"max_rounds": -1}, {"max_rounds": 99}]
)
def test_patience_has_bounds(wrong):
    with pytest.raises(UsageError, match="Patience"):
        replace(Patience(1.0, 900), **wrong)


def test_what_is_asked_is_read_as_it_was_written():
    asked = Asked("who?", 5, Patience(0.5, 900, 1), 12_345)
    content = read_json(asked.message().frame)
    assert read_asked(content, content["questions"], 5) == asked
    bad = [
        {"n_bytes": 0},
        {"n_bytes": 1 << 40},
        {"n_bytes": "9"},
        {"patience": 3},
        {"patience": {"margin": 1}},
    ]
    bad += [{"patience": {**asdict(asked.patience), "margin": "x"}}, {"patience": {"other": 1}}]
    for change in bad:
        with pytest.raises((Malformed, LimitExceeded)):
            read_asked({**content, **change}, content["questions"], 5)
    with pytest.raises(Malformed):
        read_asked(content, ["one", "two"], 5)
    with pytest.raises(Malformed):
        read_more(json_frame(MessageKind.REQUEST, {"offset": 0, "n_bytes": 7}))
    assert unpack(asked.message().data).bodies(SegmentType.JSON)
