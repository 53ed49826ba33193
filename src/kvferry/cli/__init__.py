"""The command `kvferry`: one file and one line per verb. A verb imports what is heavy when it is called."""

from typing import Annotated

import typer

from kvferry import __version__
from kvferry.cli.aligners import aligners
from kvferry.cli.ask import ask
from kvferry.cli.bench import bench
from kvferry.cli.bench_progressive import bench_progressive, bench_refine
from kvferry.cli.bytes import count_bytes
from kvferry.cli.certify import certify
from kvferry.cli.curve import curve
from kvferry.cli.demo import demo
from kvferry.cli.export import export
from kvferry.cli.fit import fit
from kvferry.cli.fit_importance import fit_importance
from kvferry.cli.fit_indexer import fit_indexer
from kvferry.cli.group import Verbs
from kvferry.cli.inspect import inspect
from kvferry.cli.pack import pack_file
from kvferry.cli.profile import profile
from kvferry.cli.schedule import schedule
from kvferry.cli.send import send
from kvferry.cli.serve import serve
from kvferry.cli.unpack import unpack_file
from kvferry.cli.zoo import zoo

app = typer.Typer(
    name="kvferry", cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(ask)
app.command()(serve)
app.command()(send)
app.command("pack")(pack_file)
app.command("unpack")(unpack_file)
app.command()(inspect)
app.command("bytes")(count_bytes)
app.command()(demo)
app.command()(fit)
app.command("fit-importance")(fit_importance)
app.command("fit-indexer")(fit_indexer)
app.command()(export)
app.command()(certify)
app.command()(profile)
app.command()(curve)
app.command()(schedule)
app.command()(aligners)
bench.command("progressive")(bench_progressive)
bench.command("refine")(bench_refine)
app.add_typer(bench, name="bench")
app.add_typer(zoo, name="zoo")


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hand what one language model has read to another one, as a KV cache."""


def main() -> None:
    """The console script."""
    app()
