"""`kvferry ask`: one model reads, another one answers, in one process."""

import asyncio
from typing import TYPE_CHECKING

from kvferry.cli.choices import (
    CODEC,
    RECEIVER,
    SELECT,
    SENDER,
    AlignerOption,
    CodecOption,
    ContextOption,
    JsonFlag,
    MaxBytesOption,
    QuestionOption,
    ReceiverOption,
    SelectOption,
    SenderOption,
    choose_aligner,
    choose_codec,
    choose_selector,
    read_context,
    read_question,
)

if TYPE_CHECKING:
    from kvferry.cli.exchange import Answered
    from kvferry.link import Channel
    from kvferry.session.message import Message
    from kvferry.session.receiver import Receiver


def ask(
    context: ContextOption,
    question: QuestionOption,
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    aligner: AlignerOption = None,
    codec: CodecOption = CODEC,
    select: SelectOption = SELECT,
    max_bytes: MaxBytesOption = None,
    json: JsonFlag = False,
) -> None:
    """Let one model read a text and another one answer a question about it."""
    text, asked = read_context(context), read_question(question)
    coder, selector = choose_codec(codec), choose_selector(select)
    from kvferry.cli.exchange import read, show
    from kvferry.models.load import load
    from kvferry.session.receiver import Receiver
    from kvferry.session.sender import Sender

    model = load(sender)  # an unknown name is told before that of an aligner
    answerer = Receiver(load(receiver), choose_aligner(aligner, sender, receiver))
    reader = Sender(model, coder, answerer.onto, selector, answerer.aligner)
    message, times = read(reader, text, max_bytes, asked)
    show(asyncio.run(_ask_here(answerer, reader.hello(), message, asked, times)), json)


async def _ask_here(
    receiver: "Receiver", hello: "Message", message: "Message", question: str, times: dict[str, float]
) -> "Answered":
    """Through an in-memory link: the same conversation as by TCP."""
    from kvferry.cli.exchange import put
    from kvferry.link import memory_pair
    from kvferry.session.exchange import ANSWER_TIMEOUT_S, greet

    near, far = memory_pair(timeout_s=ANSWER_TIMEOUT_S)
    answering = asyncio.create_task(_converse(receiver, far))
    try:
        return await put(await greet(near, hello), message, question, times)
    finally:
        await near.close()
        await answering


async def _converse(receiver: "Receiver", channel: "Channel") -> None:
    """The receiver's half; whatever becomes of it, the sender does not wait in vain."""
    from kvferry.session.exchange import converse

    try:
        await converse(receiver, channel)
    finally:
        await channel.close()
