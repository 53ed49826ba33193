"""`kvferry zoo`: the tiny models that ship with the package."""

from pathlib import Path
from typing import Annotated

import typer

zoo = typer.Typer(no_args_is_help=True, help="The tiny models that ship with the package.")


@zoo.command("list")
def list_models() -> None:
    """Name the models, one per line, with what they are."""
    from kvferry.models.zoo import catalog

    for entry in catalog.list_zoo():
        print(f"{entry.name:8}{entry.summary}")


@zoo.command("train")
def train_model(
    name: Annotated[str, typer.Argument(help="Which model; see kvferry zoo list.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model's folder into.")] = Path("zoo"),
) -> None:
    """Train a model of the zoo anew, as the shipped one was made."""
    from kvferry.models.zoo.train import train_zoo

    print(train_zoo(name, out).path)
