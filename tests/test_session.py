"""Sender and receiver: equal answers by every way of moving the message, and refusal of what must not be used."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch
import zstandard

from kvferry.align.contract import Contract
from kvferry.align.identity import Identity
from kvferry.align.linear import Linear
from kvferry.align.shipped import aligner_path, names
from kvferry.codec import CODECS
from kvferry.errors import (
    BudgetTooSmall,
    ChecksumMismatch,
    CodecNotCovered,
    ContextTooLong,
    ContractError,
    EmptyContext,
    ForeignModel,
    GridMismatch,
    KvferryError,
    Malformed,
    NotFinite,
    PeerRefused,
    Truncated,
    UnknownContract,
    UsageError,
    WireError,
)
from kvferry.link import memory_pair
from kvferry.models.load import load
from kvferry.models.zoo.worlds import make_item
from kvferry.session.exchange import call, converse, greet, serve
from kvferry.session.message import Message, message_of, text_message
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.wire import MessageKind, Segment, SegmentType, TokenGrid, json_frame, read_json

ITEMS = [make_item(i, n_facts=4, n_fillers=i % 3) for i in range(6)]
TEXTS, QUESTIONS = [item.context for item in ITEMS], [item.question for item in ITEMS]


@pytest.fixture(scope="module")
def sender():
    return Sender("llama", codec="int(bits=8)")


@pytest.fixture(scope="module")
def receiver():
    return Receiver("gemma3", aligner_path("llama", "gemma3"))


@pytest.fixture(scope="module")
def message(sender):
    return sender.read(TEXTS[0])


def test_one_after_the_other_through_a_file_equals_both_at_once(sender, receiver, tmp_path):
    for codec in ("raw(dtype=float16)", "int(bits=8)", "int(bits=4)"):
        message = sender.with_codec(codec).read(TEXTS[1])
        at_once = receiver.answer(message, QUESTIONS[1])
        message.save(tmp_path / "message.kvw")
        again = Receiver("gemma3", aligner_path("llama", "gemma3"))
        later = again.answer(Message.load(tmp_path / "message.kvw"), QUESTIONS[1])
        assert (later.text, later.ended_by) == (at_once.text, at_once.ended_by)
        assert len(message) == (tmp_path / "message.kvw").stat().st_size


def test_a_batch_answers_as_one_by_one(sender, receiver):
    messages = sender.read_batch(TEXTS)
    together = receiver.answer_batch(messages, QUESTIONS)
    for text, question, reply in zip(TEXTS, QUESTIONS, together, strict=True):
        assert receiver.answer(sender.read(text), question).text == reply.text


def test_the_same_model_needs_no_aligner_and_answers_as_if_it_had_read_the_text():
    sender = Sender("qwen3", codec="raw")
    receiver = Receiver(sender.model)
    for text, question in zip(TEXTS, QUESTIONS, strict=True):
        own = receiver.answer(text_message(text), question)
        assert (
            receiver.answer(sender.read(text), question).text
            == own.text
            == sender.answer(text, question).text
        )


def test_models_loaded_at_16_bits_keep_the_contract():
    sender = Sender(load("llama", dtype="bfloat16"))
    receiver = Receiver(load("gemma3", dtype="bfloat16"), aligner_path("llama", "gemma3"))
    replies = receiver.answer_batch(sender.read_batch(TEXTS), QUESTIONS)
    assert [reply.text for reply in replies] == [item.answer for item in ITEMS]


def test_text_messages_are_read_as_text(receiver):
    plain, packed = text_message(TEXTS[0]), text_message(TEXTS[0], compress=True)
    assert receiver.answer(plain, QUESTIONS[0]).text == ITEMS[0].answer
    assert receiver.answer(packed, QUESTIONS[0]).text == ITEMS[0].answer


def test_packed_text_must_state_its_size(receiver):
    body = zstandard.ZstdCompressor(write_content_size=False).compress(b"Ann has tea in Oslo.")
    frame = replace(text_message("x", compress=True).frame, segments=(Segment(SegmentType.TEXT_ZSTD, body),))
    with pytest.raises(Malformed, match="does not state its size"):
        receiver.answer(message_of(frame), QUESTIONS[0])


def test_text_is_streamed_as_it_is_said(receiver, message):
    said = []
    reply = receiver.answer(message, QUESTIONS[0], on_text=lambda _, text: said.append(text))
    assert "".join(said).strip() == reply.text


def test_a_cap_is_kept_or_refused_with_the_smallest_that_would_do(sender):
    n_bytes = len(sender.read(TEXTS[0]))
    assert len(sender.read(TEXTS[0], max_bytes=n_bytes)) == n_bytes
    with pytest.raises(BudgetTooSmall) as refusal:
        sender.read(TEXTS[0], max_bytes=n_bytes - 1)
    assert refusal.value.smallest_bytes == n_bytes


def test_what_cannot_be_read_is_refused(sender):
    with pytest.raises(EmptyContext):
        sender.read(" \n")
    with pytest.raises(ContextTooLong, match="1024 positions"):
        sender.read("Ann has tea in Oslo. " * 400)


def test_nan_in_a_cache_is_named(sender):
    kv = sender.capture([TEXTS[0]])
    kv.groups[0].values[1, 0, 0, 2, 3] = math.nan
    with pytest.raises(NotFinite, match="layer 1, head 0, token 2"):
        sender.encode(kv)


FOREIGN = {
    "model": ({"model_hash": 1}, ForeignModel),
    "tokenizer": ({"tokenizer_hash": 1}, ForeignModel),
    "grid": ({"grid": TokenGrid.RECEIVER}, GridMismatch),
    "kind": ({"kind": MessageKind.RESET}, ContractError),
}


@pytest.mark.parametrize(("fields", "error"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_message_is_refused_and_the_receiver_stays_up(receiver, message, fields, error):
    with pytest.raises(error):
        receiver.answer(message_of(replace(message.frame, **fields)), QUESTIONS[0])
    assert receiver.answer(message, QUESTIONS[0]).text


def test_a_codec_that_was_not_fitted_is_refused(sender, receiver):
    with pytest.raises(CodecNotCovered, match="group=8"):
        receiver.answer(sender.with_codec("int(bits=4, group=8)").read(TEXTS[0]), QUESTIONS[0])


def test_any_changed_byte_is_refused(receiver, message):
    for place in range(0, len(message), max(1, len(message) // 40)):
        data = bytearray(message.data)
        data[place] ^= 0x10
        with pytest.raises(WireError):
            receiver.answer(Message(bytes(data)), QUESTIONS[0])
    with pytest.raises(Truncated):
        receiver.answer(Message(message.data[:-3]), QUESTIONS[0])


def test_a_receiver_needs_an_aligner_made_for_it(sender, receiver):
    with pytest.raises(ForeignModel, match="another receiver"):
        Receiver(sender.model, receiver.aligner)
    with pytest.raises(ForeignModel):
        Receiver("qwen3").answer(sender.read(TEXTS[0]), QUESTIONS[0])


def test_batches_must_match(receiver, message):
    with pytest.raises(UsageError, match="0 messages"):
        receiver.answer_batch([], [])
    with pytest.raises(UsageError, match="question is empty"):
        receiver.answer(message, " ")
    with pytest.raises(UsageError, match="text and cache"):
        receiver.answer_batch([message, text_message("x")], ["a", "b"])


async def test_a_conversation_in_memory(sender, receiver):
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    replies = await remote.ask(sender.read_batch(TEXTS), QUESTIONS)
    assert [reply.text for reply in replies] == [item.answer for item in ITEMS]
    await remote.close()
    await answering


async def test_a_refused_message_costs_neither_the_connection_nor_the_receiver(sender, receiver, message):
    broken = Message(message.data[:-1] + b"\0")
    with pytest.raises(ChecksumMismatch):
        receiver.answer(broken, QUESTIONS[0])
    async with await serve(receiver, "127.0.0.1", 0) as listener:
        remote = await call("127.0.0.1", listener.port, sender.hello())
        with pytest.raises(PeerRefused, match="ChecksumMismatch"):
            await remote.ask([message, broken], QUESTIONS[:2])
        reply = (await remote.ask([message], QUESTIONS[:1]))[0]
        assert reply.text == ITEMS[0].answer
        await remote.close()


async def test_messages_after_hello_have_short_headers(sender, receiver, message):
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    assert message.frame.agreement.contract_id in remote.contracts
    for one in (message, text_message(TEXTS[0])):
        before = near.meter.sent["message"]
        (reply,) = await remote.ask([one], QUESTIONS[:1])
        assert reply.text == ITEMS[0].answer
        assert near.meter.sent["message"] - before == len(one) - 40 == len(remote.agreed(one))
        assert remote.agreed(one).frame.short
        assert remote.agreed(one).agreed([]) == one
    request = message_of(json_frame(MessageKind.REQUEST, {"questions": QUESTIONS[:1], "max_new_tokens": 32}))
    assert near.meter.sent["request"] == 2 * (len(request) - 40)
    await remote.close()
    await answering


async def test_another_contract_keeps_the_full_header_and_is_refused(sender, receiver, message):
    """And a short header under a contract that nobody agreed to costs its request alone."""
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    foreign = message_of(replace(message.frame, profile_hash=5))
    assert remote.agreed(foreign) == foreign
    with pytest.raises(PeerRefused, match="ForeignProfile"):
        await remote.ask([foreign], QUESTIONS[:1])
    with pytest.raises(PeerRefused, match="UnknownContract"):
        await remote.ask([message_of(replace(foreign.frame, short=True))], QUESTIONS[:1])
    assert (await remote.ask([message], QUESTIONS[:1]))[0].text == ITEMS[0].answer
    await remote.close()
    await answering


def test_a_short_message_from_a_file_is_refused(receiver, message):
    with pytest.raises(UnknownContract, match="full header"):
        receiver.answer(message_of(replace(message.frame, short=True)), QUESTIONS[0])


async def test_a_profile_is_part_of_the_agreement(sender):
    """A receiver agrees to the profiles that its aligner was fitted under, as far as they are at hand."""
    coder = CODECS.parse("ecsq(step=32, profile=llama)").agreed()
    coded_with = (repr(coder), "ecsq(step=0, weighting=layer, profile=p0123456789abcdef)")
    own = sender.model.geometry
    holder = Receiver(sender.model, Identity(Contract(own, own, coded_with=coded_with)))
    profiled = sender.with_codec("ecsq(step=32, profile=llama)")
    ids = read_json(holder.welcome(profiled.hello()).frame)["contracts"]
    message = profiled.read(ITEMS[0].context)
    assert ids == [agreed.contract_id for agreed in holder.agreements]
    assert len(ids) == 3
    assert message.frame.agreement in holder.agreements
    assert holder.answer(message, QUESTIONS[0]).text == ITEMS[0].answer


@pytest.mark.parametrize("answer", [{"contracts": 5}, {"contracts": ["a"]}, {"codecs": None}])
async def test_an_answer_to_hello_that_cannot_be_read_is_refused(sender, answer):
    near, far = memory_pair()
    await far.send(message_of(json_frame(MessageKind.HELLO, answer)).data)
    with pytest.raises(Malformed, match="HELLO lists"):
        await greet(near, sender.hello())
    await near.close()


REQUESTS = {
    "no questions": {"max_new_tokens": 4},
    "not text": {"questions": [1], "max_new_tokens": 4},
    "none": {"questions": [], "max_new_tokens": 4},
    "too many": {"questions": ["?"] * 257, "max_new_tokens": 4},
    "too long": {"questions": ["?"], "max_new_tokens": 10**6},
    "a number in words": {"questions": ["?"], "max_new_tokens": "4"},
}


@pytest.mark.parametrize("content", REQUESTS.values(), ids=REQUESTS)
async def test_a_request_that_cannot_be_read_ends_the_talk_with_a_reason(sender, receiver, content):
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    await near.send(message_of(json_frame(MessageKind.REQUEST, content)).data)
    frame = Message(await near.receive()).frame
    assert frame.kind == MessageKind.ERROR
    await answering
    await remote.close()


async def test_a_failure_of_the_receiver_is_answered_too(sender, receiver, message, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(receiver, "answer_batch", fail)
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    assert remote.codecs == receiver.contract.coded_with
    with pytest.raises(PeerRefused, match="the receiver failed: RuntimeError"):
        await remote.ask([message], QUESTIONS[:1])
    with pytest.raises(UsageError, match="1 messages and 2 questions"):
        await remote.ask([message], QUESTIONS[:2])
    await remote.close()
    await answering


async def test_a_request_of_too_many_bytes_ends_the_talk(sender, receiver, message, monkeypatch):
    monkeypatch.setattr("kvferry.session.exchange.MAX_REQUEST_BYTES", 3 * len(message) // 2)
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    with pytest.raises(PeerRefused, match="LimitExceeded"):
        await remote.ask([message, message], QUESTIONS[:2])
    await answering
    await remote.close()


HELLOS = {
    "another model": ({"model": "f" * 64}, "ForeignModel"),
    "another tokenizer": ({"tokenizer": "f" * 64}, "ForeignModel"),
    "another grid": ({"grid": "receiver"}, "GridMismatch"),
    "another codec": ({"codec": "int(bits=4, group=8, axis=token)"}, "CodecNotCovered"),
    "no codec": ({"codec": None}, "Malformed"),
    "no model": ({"model": ""}, "ForeignModel"),
}


@pytest.mark.parametrize(("fields", "error"), HELLOS.values(), ids=HELLOS)
async def test_hello_is_checked_first(sender, receiver, fields, error):
    content = {**read_json(sender.hello().frame), **fields}
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    with pytest.raises(PeerRefused, match=error):
        await greet(near, message_of(json_frame(MessageKind.HELLO, content)))
    await near.close()
    await answering


async def test_a_first_message_that_is_no_hello_is_refused(receiver, message):
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    with pytest.raises(PeerRefused, match="Begin with HELLO"):
        await greet(near, message)
    await near.close()
    await answering


@pytest.mark.parametrize("name", names())
def test_every_shipped_aligner_loads_and_answers(name):
    left, _, right = name.partition("-to-")
    sender, receiver = Sender(left), Receiver(right, aligner_path(left, right))
    replies = receiver.answer_batch(sender.read_batch(TEXTS), QUESTIONS)
    right_ones = sum(reply.text == item.answer for reply, item in zip(replies, ITEMS, strict=True))
    assert right_ones >= 5


def test_two_pretrained_strangers_take_the_same_path(shared_dir):
    """Mechanics only: an unfitted map between real models of different depth, heads and tokenizer."""
    sender = Sender(str(shared_dir / "models" / "stories260K"), codec="int(bits=8)")
    model = load(str(shared_dir / "models" / "tinystories656K"))
    contract = Contract(
        sender=sender.model.geometry, receiver=model.geometry, coded_with=(repr(sender.codec),), stride=0.5
    )
    aligner = Linear(contract)
    torch.nn.init.normal_(aligner.weight, std=0.01)
    reply = Receiver(model, aligner).answer(sender.read("Once upon a time there was a dog."), "Who?")
    assert set(reply.stages_ms) == {"decode", "align", "prefill", "generate"}
    own = Receiver(model, Identity(Contract(sender=model.geometry, receiver=model.geometry)))
    with pytest.raises(KvferryError, match="model"):
        own.answer(sender.read("Once upon a time."), "Who?")
