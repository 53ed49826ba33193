"""`kvferry demo`: the whole path between two processes, beside every alternative."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import (
    RECEIVER,
    SENDER,
    AlignerOption,
    ReceiverOption,
    SenderOption,
    choose_aligner,
)
from kvferry.cli.paths import require_files, require_folders

if TYPE_CHECKING:
    from kvferry.lab.demo import Demo, DemoResult


def demo(
    items: Annotated[int, typer.Option(min=2, help="How many items; they come in twins.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the items.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an HTML page and its picture.")
    ] = None,
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    aligner: AlignerOption = None,
) -> None:
    """One model reads, another one in a second process answers; beside it text, controls and statistics."""
    from kvferry.lab.demo import Demo
    from kvferry.lab.report import require_tools

    require_files(json)
    require_folders(report)
    if report:
        require_tools()
    result = _run(Demo(sender, receiver, choose_aligner(aligner, sender, receiver), items, seed))
    _show(result)
    _write(result, json, report)


def _run(demo: "Demo") -> "DemoResult":
    from rich.console import Console
    from rich.progress import Progress

    from kvferry.lab.demo import run_demo

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading both models", total=demo.n_steps())

        def on_arm(arm: str) -> None:
            progress.update(task, description=arm, advance=1)

        return run_demo(demo, on_arm)


def _show(result: "DemoResult") -> None:
    from rich.console import Console

    from kvferry.lab.summary import controls, summary
    from kvferry.lab.table import rich_table

    console = Console(highlight=False)
    console.print(rich_table(result))
    for sentence in summary(result):
        console.print(f"\n{sentence}")
    console.print("\nControls")
    for line in controls(result):
        console.print(f"  {line}")
    roles = ", ".join(f"{process['role']} {process['pid']}" for process in result.processes)
    console.print(f"\nProcesses: {roles}, joined by TCP.")


def _write(result: "DemoResult", json: Path | None, report: Path | None) -> None:
    from kvferry.lab.ledger import save_result
    from kvferry.lab.report import write_report

    if json:
        save_result(result, json)
    if report:
        print(f"Report: {write_report(result, report)}")
