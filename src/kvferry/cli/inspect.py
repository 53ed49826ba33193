"""`kvferry inspect`: what is in a message."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import JsonFlag, KeyFileOption, read_key
from kvferry.cli.paths import require_readable

if TYPE_CHECKING:
    from kvferry.session.survey import Survey

_SHOWN_CHARACTERS = 400


def inspect(
    file: Annotated[Path, typer.Argument(help="A message, as kvferry pack writes it.")],
    key_file: KeyFileOption = None,
    json: JsonFlag = False,
) -> None:
    """Show header, segments and sizes of a message. No model is needed. Exit code 1 if it is damaged."""
    require_readable(file, "pack")
    from kvferry.session.message import Message
    from kvferry.session.survey import survey

    found, error = survey(Message.load(file).data, read_key(key_file))
    if json:
        print(json_module.dumps({"file": file.name, **asdict(found)}, indent=1))
    else:
        print("\n".join(_lines(found)))
    if error:
        raise error


def _lines(found: "Survey") -> list[str]:
    lines = [f"{found.n_bytes:,} bytes, {found.n_bytes_whole:,} of them whole"] if found.error else []
    if found.header is None:
        return lines
    return [*lines, *_header(found), *_content(found), "", *_table(found)]


def _header(found: "Survey") -> list[str]:
    header = found.header
    if header is None:
        return []
    ids = f"frame {header.frame_id}" + (f" on frame {header.reference_id}" if header.reference_id else "")
    seal = "  sealed" if header.sealed else ""
    hashes = {"contract": header.contract} if header.hashes is None else header.hashes
    return [
        f"KVWire {header.version}  {header.kind}  {header.frame_type} {ids}  {found.n_bytes:,} bytes{seal}",
        "hashes  " + "  ".join(f"{name} {value}" for name, value in hashes.items()),
    ]


def _content(found: "Survey") -> list[str]:
    if found.text is not None:
        return [f"text    {_short(found.text)}"]
    if found.json is not None:
        return [f"json    {_short(json_module.dumps(found.json, sort_keys=True))}"]
    return _cache(found)


def _cache(found: "Survey") -> list[str]:
    cache, header = found.cache, found.header
    if cache is None or header is None:
        return []
    step = f"  step {header.step} ({header.step_size:.4g})" if header.step else ""
    bits = f", {cache.bits_per_element:.3f} bits each" if cache.bits_per_element else ""
    slots = f"{header.tokens} tokens on the {header.grid} grid, {cache.keys} keys"
    layers = (
        f"{row.layers} of {row.heads} heads, {row.key_dim} + {row.value_dim} channels" for row in cache.layers
    )
    held = (f"layers  {text}, {row.tokens} tokens" for text, row in zip(layers, cache.layers, strict=True))
    return [f"codec   {cache.codec}{step}", f"cache   {slots}, {cache.numbers:,} numbers{bits}", *held]


def _table(found: "Survey") -> list[str]:
    lines = [f"{'offset':>10}  {'bytes':>10}  {'share':>6}  {'type':>4}  {'segment':12}  checksum"]
    if found.header:
        size = found.header.n_bytes
        lines.append(f"{0:>10,}  {size:>10,}  {size / found.n_bytes:>6.1%}        header")
    for row in found.segments:
        sizes = f"{row.offset:>10,}  {row.n_bytes:>10,}  {row.share:>6.1%}"
        mark = "" if row.critical else "  ancillary"
        lines.append(f"{sizes}  {row.type:>4}  {row.name:12}  {row.checksum}{mark}")
    return lines


def _short(text: str) -> str:
    return (
        text
        if len(text) <= _SHOWN_CHARACTERS
        else f"{text[:_SHOWN_CHARACTERS]} ... ({len(text):,} characters)"
    )
