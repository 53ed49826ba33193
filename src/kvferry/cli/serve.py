"""`kvferry serve`: the side that answers, as a process of its own."""

import asyncio
import json
import os
from typing import TYPE_CHECKING

from kvferry.cli.choices import (
    HOST,
    PORT,
    RECEIVER,
    SENDER,
    AlignerOption,
    HostOption,
    PortOption,
    ReceiverOption,
    SenderOption,
    choose_aligner,
)

if TYPE_CHECKING:
    from kvferry.session.receiver import Receiver


def serve(
    receiver: ReceiverOption = RECEIVER,
    sender: SenderOption = SENDER,
    aligner: AlignerOption = None,
    host: HostOption = HOST,
    port: PortOption = PORT,
) -> None:
    """Answer questions about what other processes have read. The first line says where, as JSON."""
    from kvferry.models.load import load
    from kvferry.session.receiver import Receiver

    model = load(receiver)
    asyncio.run(_serve(Receiver(model, choose_aligner(aligner, sender, receiver)), host, port))


async def _serve(receiver: "Receiver", host: str, port: int) -> None:
    from kvferry.session import exchange

    async with await exchange.serve(receiver, host, port) as listener:
        print(json.dumps({"host": host, "port": listener.port, "pid": os.getpid()}), flush=True)
        await listener.serve_forever()
