"""`kvferry fit-importance`: how much each slot of a sender's cache counts for its receiver's answers."""

import json as json_module
import time
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.choices import (
    RECEIVER,
    SENDER,
    AlignerOption,
    JsonFlag,
    SenderOption,
    TextsOption,
    choose_aligner,
    choose_codec,
)
from kvferry.cli.paths import require_folders


def fit_importance(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    sender: SenderOption = SENDER,
    receiver: Annotated[
        str, typer.Option(help="The model that answers; the sender itself needs no aligner.")
    ] = RECEIVER,
    aligner: AlignerOption = None,
    codec: Annotated[
        str, typer.Option(help="The codec whose steps are learned for, with its profile.")
    ] = "ecsq",
    data: TextsOption = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Contexts in a step.")] = 16,
    lowest_bits: Annotated[float, typer.Option(help="Lowest rate trained at, bits a number.")] = 0.02,
    highest_bits: Annotated[float, typer.Option(help="Highest rate trained at.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Decides contexts, rates and noise.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Learn which slots count, for --select "lagrangian(importance='DIR')": fewer bytes at equal accuracy."""
    from dataclasses import replace

    from kvferry.cli.data import source_named
    from kvferry.models.load import load
    from kvferry.session.receiver import Receiver
    from kvferry.train.importance_fit import ImportanceRecipe, card_of, write_importance
    from kvferry.train.importance_fit import fit_importance as fit
    from kvferry.train.route import Route

    plain = ImportanceRecipe(codec, lowest_bits, highest_bits, batch_size=batch_size, seed=seed)
    recipe = replace(plain, loop=replace(plain.loop, steps=steps, seed=seed))
    choose_codec(codec)
    require_folders(out)
    reader = load(sender)
    answers = reader if sender == receiver else load(receiver)
    answering = Receiver(answers, choose_aligner(aligner, sender, receiver))
    route, start = Route(reader, answering.model, answering.contract.grid), time.perf_counter()
    losses: list[float] = []
    importance = fit(
        route,
        answering.aligner,
        source_named(data, reader, answers),
        recipe,
        lambda step: losses.append(step.loss),
    )
    write_importance(importance, route, recipe, out, card_of(route, recipe, losses))
    seconds = time.perf_counter() - start
    said = {"out": str(out), "steps": len(losses), "seconds": seconds, "losses": losses}
    print(json_module.dumps(said) if json else f"{out}: {len(losses)} steps, {seconds:.0f} s")
