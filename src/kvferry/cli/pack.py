"""`kvferry pack`: what a model has read, as a message in a file."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import (
    CODEC,
    SENDER,
    CodecOption,
    JsonFlag,
    KeyFileOption,
    MaxBytesOption,
    OntoOption,
    SenderOption,
    choose_codec,
    read_context,
    read_key,
)
from kvferry.errors import BudgetTooSmall, UsageError

if TYPE_CHECKING:
    from kvferry.kv import KV
    from kvferry.session.message import Message
    from kvferry.session.sender import Sender


def pack_file(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the message goes.")],
    context: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="The text to read; - is stdin.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of a text: a cache that unpack wrote.")
    ] = None,
    sender: SenderOption = SENDER,
    onto: OntoOption = None,
    codec: CodecOption = CODEC,
    max_bytes: MaxBytesOption = None,
    key_file: KeyFileOption = None,
    json: JsonFlag = False,
) -> None:
    """Read a text and write the message to a file, whole or not at all."""
    if (context is None) == (cache is None):
        raise UsageError("a message is made of a text or of a cache", cure="Give --context or --cache")
    if cache is not None and onto is not None:
        raise UsageError("--onto for a cache", cure="Leave it out: a cache stays on the tokens that it has")
    text = None if context is None else read_context(context)
    key, coder = read_key(key_file), choose_codec(codec)
    from kvferry.session.sender import Sender

    reader = Sender(sender, coder, onto)
    message = _message(reader, _cache(reader, text, cache), max_bytes, key)
    message.save(out)
    _show(message, key, out, json)


def _cache(reader: "Sender", text: str | None, file: Path | None) -> "KV":
    if text is not None:
        return reader.capture([text])
    from kvferry.session.cache_file import load_cache

    return load_cache(file or "", reader.model.geometry)


def _message(reader: "Sender", kv: "KV", max_bytes: int | None, key: bytes | None) -> "Message":
    """The message, sealed if there is a key; its seal counts under the cap."""
    from kvferry.session.message import Message
    from kvferry.wire import MAC_BYTES, pack

    spare = MAC_BYTES if key else 0
    (sequence,) = kv.sequences()
    try:
        frame = reader.codec.encode(sequence, max_bytes=None if max_bytes is None else max_bytes - spare)
    except BudgetTooSmall as error:
        raise BudgetTooSmall(max_bytes or 0, error.smallest_bytes + spare) from None
    return Message(pack(frame, key))


def _show(message: "Message", key: bytes | None, out: Path, as_json: bool) -> None:
    from kvferry.session.survey import survey

    found, _ = survey(message.data, key)
    tokens = found.header.tokens if found.header else 0
    bits = found.cache.bits_per_element if found.cache else None
    if as_json:
        content = {"file": str(out), "message": len(message), "tokens": tokens, "bits_per_element": bits}
        print(json_module.dumps(content))
    else:
        print(f"{len(message):,} bytes  {tokens} tokens  {bits or 0:.3f} bits per element")
