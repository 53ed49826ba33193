"""A session on the receiver's token grid: the sender pools, the wire counts it, the receiver answers or refuses."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import contract
from kvferry.align.folder import save_aligner
from kvferry.align.receiver_grid import classes_of
from kvferry.align.shipped import aligner_path
from kvferry.cli import app
from kvferry.errors import FolderError, GridMismatch, PeerRefused, UnknownName
from kvferry.lab.arms import ARMS, Reading, mean_groups
from kvferry.lab.demo import Demo
from kvferry.lab.items import Batch
from kvferry.link import memory_pair
from kvferry.models.load import load
from kvferry.models.tokenizer import tokenizer_of
from kvferry.models.zoo.worlds import make_item
from kvferry.session.exchange import converse, greet, serve
from kvferry.session.message import Message, message_of
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.train import fit as fitting
from kvferry.train.examples import Worlds
from kvferry.train.fit import fit
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.route import Route
from kvferry.wire import MessageKind, SegmentType, TokenGrid, json_frame, read_json

ITEMS = [make_item(i, n_facts=4) for i in range(8)]
TEXTS, QUESTIONS = [item.context for item in ITEMS], [item.question for item in ITEMS]
RECIPE = FitRecipe(
    "linear(neighbours=3)",
    ("raw(float16)", "int(bits=8)"),
    DataRecipe(texts=40, batch_size=2),
    grid="receiver",
    loop=LoopRecipe(steps=2, warmup=1),
)


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    """Behind a map that was fitted just now, in closed form and by two steps."""
    gemma = load("gemma3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "N_HELD_OUT", 8)
        patch.setattr(fitting, "PENALTIES", (1e-4,))
        fitted = fit(load("llama"), gemma, Worlds(), RECIPE)
    return Receiver(gemma, fitted.aligner)


@pytest.fixture(scope="module")
def sender(receiver) -> Sender:
    return Sender("llama", "int(bits=8)", onto=receiver.model)


@pytest.fixture(scope="module")
def folder(receiver, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("aligners") / "on-the-receivers-grid"
    save_aligner(receiver.aligner, where, "# card\n")
    return where


def n_right(texts: list[str]) -> int:
    return sum(text == item.answer for text, item in zip(texts, ITEMS, strict=True))


def test_what_is_sent_is_what_was_fitted(sender, receiver):
    got = sender.capture(TEXTS)
    wanted = Route(sender.model, receiver.model, "receiver").sent(TEXTS)
    contract.same(got, wanted)
    assert torch.equal(classes_of(got), classes_of(wanted))


def test_the_grid_is_counted(sender):
    """One token for each of the receiver's, and three bits for each of them."""
    message = sender.read(TEXTS[0])
    frame = message.frame
    (spans,) = tokenizer_of("gemma3").spans(TEXTS[:1])
    assert frame.grid == TokenGrid.RECEIVER and frame.n_tokens == len(spans)
    bits = frame.body(SegmentType.OVERLAPS)
    assert bits is not None and len(bits) == -(-3 * len(spans) // 8)
    assert bits in message.data
    capped = sender.read(TEXTS[0], max_bytes=len(message))
    assert len(capped) == len(message)


def test_the_receiver_answers_from_what_the_sender_read(sender, receiver):
    messages = sender.read_batch(TEXTS)
    together = [reply.text for reply in receiver.answer_batch(messages, QUESTIONS)]
    assert n_right(together) >= 6
    for message, question, text in zip(messages[:3], QUESTIONS, together, strict=False):
        assert receiver.answer(message, question).text == text
    elsewhere = receiver.answer_batch(messages[1:] + messages[:1], QUESTIONS)
    assert n_right([reply.text for reply in elsewhere]) <= 3


async def test_a_conversation_over_a_link(sender, receiver):
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    remote = await greet(near, sender.hello())
    messages = sender.read_batch(TEXTS)
    replies = await remote.ask(messages, QUESTIONS)
    assert n_right([reply.text for reply in replies]) >= 6
    assert near.meter.sent["message"] == sum(len(remote.agreed(message)) for message in messages)
    await remote.close()
    await answering


def test_hello_says_onto_which_tokens(sender, receiver):
    said = read_json(sender.hello().frame)
    assert (said["grid"], said["onto"]) == ("receiver", receiver.model.geometry.tokenizer)
    assert "onto" not in read_json(Sender(sender.model).hello().frame)
    assert "contracts" in read_json(receiver.welcome(sender.hello()).frame)


REFUSED = {
    "the sender's grid": ({"grid": "sender"}, "GridMismatch: tokens come on the sender grid"),
    "other tokens": (
        {"onto": "f" * 64},
        "GridMismatch: the sender pools onto the tokens of ffffffffffffffff",
    ),
    "the first digits alone": ({"onto": ""}, "GridMismatch"),
    "no tokens": ({"onto": None}, "Malformed: HELLO on the receiver's grid"),
    "a number": ({"onto": 5}, "Malformed"),
}


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=REFUSED)
async def test_a_hello_onto_other_tokens_is_refused(sender, receiver, fields, said):
    content = {**read_json(sender.hello().frame), **fields}
    near, far = memory_pair()
    answering = asyncio.create_task(converse(receiver, far))
    with pytest.raises(PeerRefused, match=said):
        await greet(near, message_of(json_frame(MessageKind.HELLO, content)))
    await near.close()
    await answering


def test_a_message_on_the_other_grid_is_refused(sender, receiver):
    own = Sender(sender.model, "int(bits=8)")
    with pytest.raises(GridMismatch, match="sender grid, the aligner reads the receiver grid"):
        receiver.answer(own.read(TEXTS[0]), QUESTIONS[0])
    shipped = Receiver(receiver.model, aligner_path("llama", "gemma3"))
    with pytest.raises(GridMismatch, match="receiver grid, the aligner reads the sender grid"):
        shipped.answer(sender.read(TEXTS[0]), QUESTIONS[0])
    with pytest.raises(GridMismatch):
        shipped.welcome(sender.hello())
    assert receiver.answer(sender.read(TEXTS[0]), QUESTIONS[0]).text


def test_a_tokenizer_is_enough(receiver, tmp_path):
    receiver.model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    wanted = receiver.model.geometry.tokenizer
    for onto in (receiver.model, "gemma3", tmp_path / "tokenizer", tokenizer_of("gemma3")):
        sender = Sender("llama", onto=onto)
        assert sender.onto is not None and sender.onto.fingerprint == wanted
        assert sender.with_codec("int(bits=4)").onto == sender.onto
    with pytest.raises(UnknownName, match="gemma3"):
        Sender("llama", onto="gema3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match="cannot load"):
        Sender("llama", onto=tmp_path / "empty")


def test_a_receiver_says_what_a_sender_must_take(receiver):
    assert receiver.onto is receiver.model
    assert Receiver(receiver.model, aligner_path("llama", "gemma3")).onto is None


# The commands


def run(*words: str, stdin: str = ""):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, words, input=stdin)


def test_ask_pools_where_the_aligner_says_so(folder):
    right = 0
    for item in ITEMS[:3]:
        words = ("--context", "-", "--question", item.question, "--aligner", str(folder))
        done = run("ask", *words, "--codec", "int(bits=8)", "--json", stdin=item.context)
        assert done.exit_code == 0, done.output
        right += json.loads(done.stdout)["answer"] == item.answer
    assert right >= 2


def test_pack_pools_where_it_is_told_to(sender, receiver, tmp_path):
    out, tensors = tmp_path / "a.kvw", tmp_path / "a.safetensors"
    words = ("--context", "-", "--codec", "int(bits=8)", "--out", str(out))
    done = run("pack", *words, "--onto", "gemma3", stdin=TEXTS[0])
    assert done.exit_code == 0, done.output
    assert Message.load(out) == sender.read(TEXTS[0])
    assert receiver.answer(Message.load(out), QUESTIONS[0]).ended_by
    assert run("unpack", str(out), "--out", str(tensors)).exit_code == 0
    again = ("--cache", str(tensors), "--codec", "int(bits=8)", "--out", str(tmp_path / "b.kvw"))
    assert run("pack", *again).exit_code == 0
    assert Message.load(tmp_path / "b.kvw").frame.grid == TokenGrid.RECEIVER
    refused = run("pack", *again, "--onto", "gemma3")
    assert refused.exit_code == 2 and "--onto for a cache" in refused.output


@contextmanager
def serving(receiver: Receiver) -> Iterator[str]:
    """The port of a receiver that listens in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listener = asyncio.run_coroutine_threadsafe(serve(receiver, "127.0.0.1", 0), loop).result(60)
    try:
        yield str(listener.port)
    finally:
        asyncio.run_coroutine_threadsafe(listener.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_send_pools_where_it_is_told_to(receiver):
    with serving(receiver) as port:
        words = (
            "send",
            "--context",
            "-",
            "--question",
            QUESTIONS[0],
            "--codec",
            "int(bits=8)",
            "--port",
            port,
        )
        done = run(*words, "--onto", "gemma3", "--json", stdin=TEXTS[0])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["answer"] and found["n_bytes"]["link"] > found["n_bytes"]["message"] > 1000
        assert "GridMismatch" in run(*words, stdin=TEXTS[0]).output
        assert "GridMismatch" in run(*words, "--onto", "llama", stdin=TEXTS[0]).output


def test_the_demo_pools_where_the_aligner_says_so(sender, folder):
    assert Demo("llama", "gemma3", str(folder)).onto() == "gemma3"
    assert Demo("llama", "gemma3", str(aligner_path("llama", "gemma3"))).onto() is None
    assert Demo("llama", "llama", None).onto() is None
    batch = Batch(tuple(ITEMS[:2]))
    kv = sender.capture(batch.contexts)
    for arm in ARMS:
        for message in arm.pack(arm.sender(sender), Reading(batch, kv, mean_groups(kv))):
            assert message.is_text or message.frame.grid == TokenGrid.RECEIVER
