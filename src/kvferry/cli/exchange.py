"""What `ask` and `send` share: read, put the question, show the answer with its bytes and times."""

import json
import time
from dataclasses import asdict, dataclass

from kvferry.session.exchange import Remote
from kvferry.session.message import Message
from kvferry.session.selecting import encode_sight
from kvferry.session.sender import Sender

STAGES = ("capture", "encode", "link", "decode", "align", "prefill", "generate")
"""In the order in which they happen."""


@dataclass(frozen=True)
class Answered:
    """An answer, the bytes it took and the milliseconds of each stage."""

    answer: str
    ended_by: str
    n_bytes: dict[str, int]
    latency_ms: dict[str, float]


def read(
    sender: Sender, text: str, max_bytes: int | None = None, question: str | None = None
) -> tuple[Message, dict[str, float]]:
    """The message, and the time of its two stages; selecting is a part of encoding."""
    start = time.perf_counter()
    (sight,) = sender.look([text], None if question is None else [question])
    captured = time.perf_counter()
    message = encode_sight(sender.codec, sender.select, sight, max_bytes)
    encoded = time.perf_counter()
    return message, {"capture": (captured - start) * 1e3, "encode": (encoded - captured) * 1e3}


async def put(remote: Remote, message: Message, question: str, times: dict[str, float]) -> Answered:
    """Ask over an open conversation. `link` is the round trip without the receiver's own stages."""
    start = time.perf_counter()
    (reply,) = await remote.ask([message], [question])
    link_ms = (time.perf_counter() - start) * 1e3 - sum(reply.stages_ms.values())
    n_bytes = {"message": len(remote.agreed(message)), "link": remote.meter.total_bytes}
    found = {**times, "link": link_ms, **reply.stages_ms}
    return Answered(
        reply.text, reply.ended_by, n_bytes, {stage: found[stage] for stage in STAGES if stage in found}
    )


def show(answered: Answered, as_json: bool) -> None:
    """The answer on the first line, what it took below."""
    if as_json:
        print(json.dumps(asdict(answered)))
        return
    print(answered.answer)
    print(f"bytes  message {answered.n_bytes['message']:,}  link {answered.n_bytes['link']:,}")
    print("ms     " + "  ".join(f"{stage} {ms:.1f}" for stage, ms in answered.latency_ms.items()))
