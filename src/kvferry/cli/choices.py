"""What several verbs ask for, and how they find it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.errors import EmptyContext, UnknownName, UsageError

if TYPE_CHECKING:
    from kvferry.codec import Codec
    from kvferry.select.contract import Selector

SENDER, RECEIVER, CODEC, SELECT = "llama", "gemma3", "ecsq", "all"
_SHORTEST_KEY, _LONGEST_KEY = 16, 64
HOST, PORT = "127.0.0.1", 7070

ContextOption = Annotated[
    str, typer.Option("--context", metavar="FILE|-", help="The text to read; - is stdin.")
]
QuestionOption = Annotated[str, typer.Option(help="What to ask about it.")]
SenderOption = Annotated[str, typer.Option(help="The model that reads: zoo name, folder or hub id.")]
ReceiverOption = Annotated[str, typer.Option(help="The model that answers: zoo name, folder or hub id.")]
ModelOption = Annotated[str, typer.Option(help="The model that will send: zoo name, folder or hub id.")]
AlignerOption = Annotated[
    str | None, typer.Option(help="Folder, hub id or shipped name. Default: the one shipped for the pair.")
]
OntoOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The receiver, if its aligner reads the receiver's own tokens: zoo name, folder or hub id.",
    ),
]
CodecOption = Annotated[str, typer.Option(help="How the cache is coded: ecsq, int(bits=8), raw, ...")]
SelectOption = Annotated[
    str, typer.Option(help="What is sent of it: all, lagrangian, question, vnorm(proportion=0.5), ...")
]
MaxBytesOption = Annotated[int | None, typer.Option(help="Cap of the message.")]
TextsOption = Annotated[
    Path | None,
    typer.Option(help="Text, or JSON lines of context, question, answer. Default: the zoo's worlds."),
]
DataOption = Annotated[
    str | None, typer.Option(help="Text, JSON lines or datasets:NAME[:COLUMN]. Default: the zoo's worlds.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Its 16 to 64 bytes are the key that seals the message.")
]
HostOption = Annotated[str, typer.Option(help="Address of the receiver.")]
PortOption = Annotated[int, typer.Option(help="Its TCP port; where a receiver starts, 0 takes a free one.")]


def read_context(name: str) -> str:
    """The text of a file, or of stdin for `-`; a `UsageError` where there is none, before a model is loaded."""
    cure = "Give the name of a text file in UTF-8, or - for stdin"
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", cure=cure) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is no UTF-8 at byte {error.start}", cure=cure) from None
    if not text.strip():
        raise EmptyContext(f"{name} holds no text", cure="Give the sender something to read")
    return text


def read_key(file: Path | None) -> bytes | None:
    """The key in a file, to the last byte; a `UsageError` where there is none."""
    if file is None:
        return None
    cure = "Make one: head -c 32 /dev/urandom > key"
    try:
        with file.open("rb") as opened:
            key = opened.read(_LONGEST_KEY + 1)
    except OSError as error:
        raise UsageError(f"cannot read the key {file}: {error.strerror}", cure=cure) from None
    if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
        limits = f"{_SHORTEST_KEY} to {_LONGEST_KEY} are needed"
        raise UsageError(f"the key {file} has {len(key)} bytes or more, {limits}", cure=cure)
    return key


def read_question(text: str) -> str:
    """The question; an `EmptyContext` for one without words, before a model is loaded."""
    if not text.strip():
        raise EmptyContext(f"the question {text!r} is empty", cure="Ask something about the context")
    return text


def choose_codec(spec: str) -> "Codec":
    """The codec of a spec, its profile at hand if it names a file; a `UsageError` or `FolderError` for one that is
    none, before a model is loaded."""
    from kvferry.codec import CODECS
    from kvferry.codec.profiles import profiles_of

    codec = CODECS.parse(spec)
    profiles_of([repr(codec)])  # one named by hash may lie in the aligner's folder, which is not open yet
    return codec


def choose_selector(spec: str) -> "Selector":
    """The selector of a spec; a `UsageError` for one that is none, before a model is loaded."""
    from kvferry.select import SELECTORS

    return SELECTORS.parse(spec)


def choose_aligner(given: str | None, sender: str, receiver: str) -> str | None:
    """The aligner asked for, else the one shipped for the pair; None for a model and itself."""
    from kvferry.align import shipped

    if given is not None:
        if given in shipped.names():
            return str(shipped.aligner_path(*given.split("-to-")))
        if "/" in given or Path(given).is_dir():
            return given
        raise UnknownName("aligner", given, shipped.names())
    if sender == receiver:
        return None
    if f"{sender}-to-{receiver}" not in shipped.names():
        cure = (
            f"Fit one (kvferry fit --out DIR) and give --aligner DIR. Shipped: {', '.join(shipped.names())}"
        )
        raise UsageError(f"no aligner is shipped from {sender} to {receiver}", cure=cure)
    return str(shipped.aligner_path(sender, receiver))
