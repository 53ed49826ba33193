"""`kvferry fit-indexer`: a lightning indexer for one model."""

import json as json_module
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import SENDER, DataOption, JsonFlag, ModelOption
from kvferry.cli.paths import require_folders

if TYPE_CHECKING:
    from kvferry.train.indexer_fit import FittedIndexer, IndexerRecipe


def fit_indexer(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; what lies there is replaced.")],
    model: ModelOption = SENDER,
    data: DataOption = None,
    heads: Annotated[int, typer.Option(help="Indexer heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Channels of each; half of them turn with the position.")] = 64,
    steps: Annotated[int, typer.Option(help="Of training.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Texts per step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at its peak.")] = 1e-2,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text that are read.")] = 512,
    seed: Annotated[int, typer.Option(help="Decides weights at the start and which texts are drawn.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Fit a lightning indexer of a model. Then: --select 'lightning(indexer="DIR")'."""
    from dataclasses import asdict, replace

    from kvferry.models.load import load, public_name
    from kvferry.select.indexer import INDEXERS
    from kvferry.train.examples import described, source_of
    from kvferry.train.indexer_card import indexer_card
    from kvferry.train.indexer_fit import DEFAULT_LOOP, IndexerRecipe
    from kvferry.train.indexer_fit import fit_indexer as fit
    from kvferry.train.sources.example import require_splits

    loop = replace(DEFAULT_LOOP, steps=steps, learning_rate=learning_rate, seed=seed)
    recipe = IndexerRecipe(heads, dim, batch_size, max_tokens, loop=loop)
    require_folders(out)
    reader = load(model)
    source = source_of(data, reader.prompt)
    require_splits(source)
    fitted = fit(reader, source, recipe)
    card = indexer_card(
        fitted, public_name(model), described(source), _command(public_name(model), data, recipe)
    )
    indexer = fitted.indexer
    INDEXERS.save(indexer, indexer.geometry, asdict(indexer.shape), out, card)
    _show(fitted, out, json)


def _show(fitted: "FittedIndexer", out: Path, json: bool) -> None:
    if json:
        from dataclasses import asdict

        rows = [asdict(held) for held in fitted.held]
        print(json_module.dumps({"out": str(out), "seconds": fitted.seconds, "held": rows}))
        return
    for held in fitted.held:
        shares = " ".join(f"{share:.3f}" for share in held.queries)
        print(f"{held.name:10} {held.proportion:4.0%} of the slots hold, layer by layer: {shares}")
    print(f"{out}  ({fitted.seconds:.0f} s)")


def _command(model: str, data: str | None, recipe: "IndexerRecipe") -> str:
    loop = recipe.loop
    where = "" if data is None else data if data.startswith("datasets:") else Path(data).name
    source = f" --data {shlex.quote(where)}" if where else ""
    return (
        f"kvferry fit-indexer --model {model}{source} --heads {recipe.heads} --dim {recipe.dim} --steps {loop.steps}"
        f" --batch-size {recipe.batch_size} --learning-rate {loop.learning_rate:g} --max-tokens {recipe.max_tokens}"
        f" --seed {loop.seed} --out DIR"
    )
