"""`kvferry certify`: what a codec's error can do behind an aligner, proven, beside what it did."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.choices import (
    CODEC,
    RECEIVER,
    SENDER,
    CodecOption,
    ReceiverOption,
    SenderOption,
    TextsOption,
    choose_aligner,
    choose_codec,
)
from kvferry.cli.paths import require_files

if TYPE_CHECKING:
    from rich.table import Table

    from kvferry.train.certify import Certificate

_LEGEND = (
    "gain: Lipschitz constants of the map into keys and values. Then, each the largest over tokens, heads and queries: "
    "errors of keys and values behind the map; how far what a query reads from the slots moved, how far it could "
    "have given these errors, and how far it could have for any error of the codec's size; that bound over what was "
    "measured; the share of reads of which the bound says nothing."
)


def certify(
    aligner: Annotated[
        str, typer.Argument(metavar="DIR", help="The aligner: folder, hub id or shipped name.")
    ],
    codec: CodecOption = CODEC,
    sender: SenderOption = SENDER,
    receiver: ReceiverOption = RECEIVER,
    data: TextsOption = None,
    n: Annotated[int, typer.Option(help="Texts to measure on.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Decides which texts are drawn.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the certificate as JSON.")] = None,
) -> None:
    """Bound what a codec's error can do to the receiver's attention behind an aligner, and measure what it does."""
    from kvferry.align.folder import aligner_folder, load_aligner
    from kvferry.codec.profiles import hold_profiles
    from kvferry.lab.ledger import write_file
    from kvferry.models.load import load
    from kvferry.train.cases import Way
    from kvferry.train.certify import certify as certify_way
    from kvferry.train.examples import source_of

    require_files(json)
    chosen, folder = choose_codec(codec), aligner_folder(choose_aligner(aligner, sender, receiver) or aligner)
    hold_profiles(folder)
    source, target = load(sender), load(receiver)
    way = Way(source, target, load_aligner(folder).to(target.device), chosen)
    found = certify_way(way, source_of(data, target.prompt), n=n, seed=seed)
    _show(found)
    if json is not None:
        rows = [{**asdict(layer), "ratio": layer.ratio} for layer in found.layers]
        content = {**asdict(found), "vacuous": found.vacuous, "layers": rows}
        write_file(json, (json_module.dumps(content, indent=1) + "\n").encode())


def _show(found: "Certificate") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.print(
        f"{found.aligner}, {found.n_parameters:,} parameters, {found.map_ms_per_token:.3f} ms per token"
    )
    console.print(found.codec + ("" if found.covered else "  (not covered by the aligner)"))
    share = found.input_error_mean / found.input_norm_mean
    console.print(
        f"input error, measured on {found.n_tokens} tokens of {found.n_texts} texts, L2 over {found.neighbours} "
        f"tokens side by side: {found.input_error_mean:.4g} ({share:.2%}), at most {found.input_error_max:.4g}"
    )
    console.print(_table(found))
    console.print(
        "the map's own error, measured only: attention cosine "
        f"{found.attention_cosine:.3f}, relative error {found.attention_error:.3f} against the receiver's own cache "
        f"({found.attention_cosine_coded:.3f}, {found.attention_error_coded:.3f} coded)"
    )
    console.print(_verdict(found))


def _table(found: "Certificate") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, caption=_LEGEND, caption_justify="left")
    columns = (
        "layer",
        "gain K",
        "gain V",
        "K error",
        "V error",
        "moved",
        "given",
        "certified",
        "ratio",
        "vacuous",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in found.layers:
        numbers = (
            row.lipschitz_k,
            row.lipschitz_v,
            row.key_error,
            row.value_error,
            row.moved,
            row.given,
            row.certified,
        )
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        table.add_row(
            str(row.layer), *(f"{number:.3g}" for number in numbers), ratio, f"{row.vacuous_certified:.0%}"
        )
    return table


def _verdict(found: "Certificate") -> str:
    """In words, for whoever reads no table."""
    if found.vacuous:
        return "VACUOUS: the certified bound allows any read whatsoever; only the measurement says something."
    said = sum(layer.n_reads * (1 - layer.vacuous_certified) for layer in found.layers)
    total = sum(layer.n_reads for layer in found.layers)
    return (
        f"The certified bound says something of {said / total:.0%} of {total:,} reads. "
        "It holds layer by layer and for these queries, and says nothing of answers."
    )
