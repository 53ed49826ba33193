"""Aligner folders: `config.json` (name and contract), `model.safetensors`, `README.md` (the card)."""

import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from kvferry.align.contract import Aligner, Contract, from_json, to_json
from kvferry.align.table import ALIGNERS
from kvferry.errors import FolderError, UnknownName

_CURE = "Give a folder written by kvferry fit, or the hub id of one"


def save_aligner(aligner: Aligner, folder: Path, card: str) -> None:
    """Write the folder beside its place, then move it there: a reader never sees half of it."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fit-") as beside:
        whole = Path(beside) / folder.name
        whole.mkdir()
        contract = to_json(aligner.contract)
        config = {"name": aligner.name, "options": aligner.options(), "contract": contract}
        (whole / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_model(aligner, str(whole / "model.safetensors"))
        (whole / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)


def load_aligner(where: str | Path) -> Aligner:
    """Load a folder or hub id. Raises `FolderError` for one that is missing, corrupt or of another kind."""
    folder = aligner_folder(where)
    with _readable(where):
        config = _config(folder)
        aligner = aligner_class(config["name"])(from_json(config["contract"]), **config["options"])
        load_model(aligner, str(folder / "model.safetensors"))
        return aligner.eval()


def load_contract(where: str | Path) -> Contract:
    """What the aligner of a folder or hub id promises, without its weights. Raises as `load_aligner` does."""
    folder = aligner_folder(where)
    with _readable(where):
        return from_json(_config(folder)["contract"])


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@contextmanager
def _readable(where: str | Path) -> Iterator[None]:
    """Whatever cannot be read is a `FolderError`."""
    try:
        yield
    except UnknownName:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise FolderError(f"no aligner in {where}: {type(error).__name__}: {error}", cure=_CURE) from error


def aligner_class(name: str) -> type[Aligner]:
    """The class behind the name in a folder; only names of our own table are looked up."""
    if name not in ALIGNERS:
        raise UnknownName("aligner", name, ALIGNERS)
    module, _, attribute = ALIGNERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def aligner_folder(where: str | Path) -> Path:
    """The folder itself, or that of a hub id, fetched; `FolderError` where there is none."""
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(str(where)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FolderError(f"no aligner folder {str(where)!r}", cure=_CURE) from error
