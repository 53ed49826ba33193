"""`kvferry bytes`: measured against analytic bytes."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import SENDER, choose_codec
from kvferry.cli.paths import require_files

if TYPE_CHECKING:
    from kvferry.lab.drift import Drift, Spread


def count_bytes(
    sender: Annotated[
        list[str] | None, typer.Option(help="A model that reads; may be given several times.")
    ] = None,
    codecs: Annotated[
        str | None, typer.Option(help="Specs separated by ';'. Default: the usual ones.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Contexts, task texts of the zoo.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the contexts.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Compare what messages take with what their codec's formula says, and show where the bytes go."""
    from kvferry.lab.drift import DEFAULT_CODECS, contexts, drifts
    from kvferry.session.sender import Sender

    require_files(json)
    chosen = [part.strip() for part in codecs.split(";")] if codecs else DEFAULT_CODECS
    coders = [choose_codec(spec) for spec in chosen]
    texts = contexts(n, seed)
    found = [row for name in sender or [SENDER] for row in drifts(Sender(name), coders, texts)]
    _show(found)
    if json:
        _write(found, seed, json)


def _show(found: "list[Drift]") -> None:
    for row in found:
        drift = "" if row.drift is None else f"   drift {row.drift:+.1%}{' !' if row.flagged else ''}"
        shares = (f"{name} {part / row.measured.mean:.1%}" for name, part in row.breakdown.items())
        print(f"{row.sender}: {row.codec}")
        print(f"  measured  {_sizes(row.measured)}")
        print(f"  formula   {_sizes(row.analytic)}{drift}")
        print(f"  shares    {', '.join(shares)}")
    if any(row.flagged for row in found):
        print("! drift above 15 %: headers, or a second stage, weigh more than the formula says")


def _sizes(spread: "Spread | None") -> str:
    if spread is None:
        return "none"
    return f"mean {spread.mean:,.0f}  median {spread.median:,.0f}  p95 {spread.p95:,.0f} bytes"


def _write(found: "list[Drift]", seed: int, file: Path) -> None:
    from kvferry.lab.ledger import write_file
    from kvferry.lab.point import commit, machine, versions

    rows = [{**asdict(row), "flagged": row.flagged} for row in found]
    where = {"machine": machine(), "versions": versions(), "commit": commit()}
    write_file(file, json_module.dumps({"seed": seed, "codecs": rows, **where}, indent=1).encode() + b"\n")
