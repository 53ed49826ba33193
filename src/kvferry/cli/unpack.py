"""`kvferry unpack`: the cache in a message, as tensors in a file."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.choices import SENDER, KeyFileOption, SenderOption, read_key
from kvferry.cli.paths import require_file, require_readable
from kvferry.errors import ContractError


def unpack_file(
    file: Annotated[Path, typer.Argument(help="A message, as kvferry pack writes it.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the tensors go, as safetensors.")],
    sender: SenderOption = SENDER,
    key_file: KeyFileOption = None,
) -> None:
    """Decode a message and write its cache to a file of safetensors, whole or not at all."""
    require_readable(file, "pack")
    require_file(out)
    from kvferry.session.message import Message
    from kvferry.wire import MessageKind, unpack

    # Damaged bytes are refused before a model is loaded.
    frame = unpack(Message.load(file).data, key=read_key(key_file))
    if frame.kind != MessageKind.KV:
        cure = "Give a message of kind KV; kvferry inspect shows what this one holds"
        raise ContractError(f"{file} is a {frame.kind.name} message and holds no cache", cure=cure)
    from kvferry.codec import codec_of, decode
    from kvferry.models.load import load
    from kvferry.session.cache_file import save_cache

    kv = decode(frame, load(sender).geometry)
    save_cache(kv, out, {"codec": repr(codec_of(frame))})
    print(f"{kv.n_tokens} tokens of {kv.geometry.n_layers} layers, {kv.space} keys, from {codec_of(frame)!r}")
