"""`kvferry pack`: what a model has read, as a message in a file."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import (
    CODEC,
    SELECT,
    SENDER,
    CodecOption,
    JsonFlag,
    KeyFileOption,
    MaxBytesOption,
    OntoOption,
    SelectOption,
    SenderOption,
    choose_codec,
    choose_selector,
    read_context,
    read_key,
)
from kvferry.cli.paths import require_file, require_readable
from kvferry.errors import BudgetTooSmall, UsageError

if TYPE_CHECKING:
    from kvferry.select.sight import Sight
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
    select: SelectOption = SELECT,
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
    if cache is not None:
        require_readable(cache, "unpack")
    require_file(out)
    key, coder, selector = read_key(key_file), choose_codec(codec), choose_selector(select)
    from kvferry.session.sender import Sender

    reader = Sender(sender, coder, onto, selector)
    message = _message(reader, _sight(reader, text, cache), max_bytes, key)
    message.save(out)
    _show(message, key, out, json)


def _sight(reader: "Sender", text: str | None, file: Path | None) -> "Sight":
    """Of a cache in a file nothing is known beside it."""
    if text is not None:
        return reader.look([text])[0]
    from kvferry.select.sight import alone
    from kvferry.session.cache_file import load_cache

    (sequence,) = load_cache(file or "", reader.model.geometry).sequences()
    return alone(sequence)


def _message(reader: "Sender", sight: "Sight", max_bytes: int | None, key: bytes | None) -> "Message":
    """The message, sealed if there is a key; its seal counts under the cap."""
    from kvferry.session.message import Message
    from kvferry.session.selecting import frame_of
    from kvferry.wire import MAC_BYTES, pack

    spare = MAC_BYTES if key else 0
    cap = None if max_bytes is None else max_bytes - spare
    try:
        frame = frame_of(reader.codec, reader.select, sight, cap)
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
