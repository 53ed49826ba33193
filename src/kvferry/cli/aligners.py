"""`kvferry aligners`: the fitted maps that ship with the package."""

from typing import Annotated

import typer


def aligners(
    names: Annotated[bool, typer.Option("--names", help="Names alone, one per line.")] = False,
) -> None:
    """Name the shipped aligners, with the codecs that each was fitted under."""
    from kvferry.align import shipped

    for name in shipped.names():
        print(name if names else f"{name:20}{'; '.join(shipped.coded_with(name))}")
