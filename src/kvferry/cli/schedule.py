"""`kvferry schedule`: which layers a schedule sends how, and which of the receiver's layers read them."""

from typing import Annotated

import typer

from kvferry.cli.choices import RECEIVER, SENDER, ReceiverOption, SenderOption


def schedule(
    spec: Annotated[str, typer.Argument(help="schedule(default=int4, overrides='0-1:int8', last_fp16=2)")],
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    layer_map: Annotated[
        str, typer.Option(help="The rule by which the receiver's layers find the sender's.")
    ] = "nearest_depth",
) -> None:
    """Print the precision of each layer of the sender, and what each layer of the receiver reads."""
    from kvferry.align.layer_map import LAYER_MAPS, Depths
    from kvferry.errors import UsageError
    from kvferry.models.load import load
    from kvferry.select import SELECTORS
    from kvferry.select.schedule import Schedule, table

    selector, rule = SELECTORS.parse(spec), LAYER_MAPS.parse(layer_map)
    if not isinstance(selector, Schedule):
        raise UsageError(f"{selector.name} is no schedule", cure="Write schedule(default=..., overrides=...)")
    n_sender, n_receiver = (load(name).geometry.n_layers for name in (sender, receiver))
    depths = Depths(n_sender, n_receiver)
    print(table(selector.of_layers(depths.n_sender), rule(depths)))
