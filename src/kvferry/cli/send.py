"""`kvferry send`: the side that reads, as a process of its own."""

import asyncio
from typing import TYPE_CHECKING

from kvferry.cli.choices import (
    CODEC,
    HOST,
    PORT,
    SELECT,
    SENDER,
    CodecOption,
    ContextOption,
    HostOption,
    JsonFlag,
    MaxBytesOption,
    OntoOption,
    PortOption,
    QuestionOption,
    SelectOption,
    SenderOption,
    choose_codec,
    choose_selector,
    read_context,
    read_question,
)

if TYPE_CHECKING:
    from kvferry.cli.exchange import Answered
    from kvferry.session.sender import Sender


def send(
    context: ContextOption,
    question: QuestionOption,
    sender: SenderOption = SENDER,
    onto: OntoOption = None,
    codec: CodecOption = CODEC,
    select: SelectOption = SELECT,
    max_bytes: MaxBytesOption = None,
    host: HostOption = HOST,
    port: PortOption = PORT,
    json: JsonFlag = False,
) -> None:
    """Read a text and let a running receiver (kvferry serve) answer a question about it."""
    text, asked = read_context(context), read_question(question)
    coder, selector = choose_codec(codec), choose_selector(select)
    from kvferry.cli.exchange import show
    from kvferry.session.sender import Sender

    show(asyncio.run(_send(Sender(sender, coder, onto, selector), text, max_bytes, asked, host, port)), json)


async def _send(
    sender: "Sender", text: str, max_bytes: int | None, question: str, host: str, port: int
) -> "Answered":
    from kvferry.cli.exchange import put, read
    from kvferry.session.exchange import call

    remote = await call(host, port, sender.hello())  # a refusal comes before the work
    try:
        message, times = read(sender, text, max_bytes, question)
        return await put(remote, message, question, times)
    finally:
        await remote.close()
