"""`kvferry export`: an aligner for runtimes without torch."""

import json as json_module
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.choices import JsonFlag, choose_aligner
from kvferry.cli.paths import require_files


def export(
    aligner: Annotated[str, typer.Argument(metavar="DIR", help="Folder, hub id or shipped name.")],
    onnx: Annotated[Path, typer.Option(metavar="FILE", help="Where the graph goes.")],
    json: JsonFlag = False,
) -> None:
    """Write an aligner's map from features to features as an ONNX graph, checked against torch."""
    from kvferry.align.export import export_onnx
    from kvferry.align.folder import load_aligner

    require_files(onnx)
    loaded = load_aligner(choose_aligner(aligner, "", "") or aligner)
    with _quiet_exporter():
        error = export_onnx(loaded, onnx)
    n_bytes = onnx.stat().st_size
    if json:
        print(json_module.dumps({"file": str(onnx), "n_bytes": n_bytes, "error": error}))
    else:
        print(f"{onnx}  {n_bytes:,} bytes, off by {error:.0e} of the largest number")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of itself, and that torchvision is missing, which no aligner needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".isinstance.treespec, LeafSpec", category=FutureWarning
            )
            yield
    finally:
        logger.setLevel(level)
