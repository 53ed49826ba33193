"""Folders of weights: `config.json` (a name from a table, and how to construct it), `model.safetensors`, `README.md`.

It stands at the ground because aligners and fusers, which do not know each other, are kept the same way. Nothing is
unpickled, only names of our own tables are looked up, and nobody ever sees half a folder.
"""

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from kvferry.errors import FolderError, MissingFolder, UnknownName
from kvferry.files import CURE

_CURE = "Give a folder written by kvferry, or the hub id of one"


def save_folder(module: nn.Module, folder: Path, config: Mapping[str, Any], card: str) -> None:
    """Write the folder beside its place, then move it there: a reader sees the whole folder or the one before it.

    Raises `FolderError` where it cannot be written, a full disk included; what lay there then stays.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fit-") as beside:
            whole = Path(beside) / folder.name
            whole.mkdir()
            _fill(whole, module, config, card)
            if folder.exists():
                folder.rename(Path(beside) / "before")
            whole.rename(folder)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"cannot write {folder}: {error}", cure=CURE) from None


def _fill(folder: Path, module: nn.Module, config: Mapping[str, Any], card: str) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_model(module, str(folder / "model.safetensors"))
    (folder / "README.md").write_text(card, encoding="utf-8")


def find_folder(where: str | Path, kind: str) -> Path:
    """The folder itself, or that of a hub id, fetched; `MissingFolder` where there is none."""
    try:
        folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(str(where)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingFolder(f"no {kind} folder {str(where)!r}", cure=_CURE) from error
    if not (folder / "config.json").is_file():
        raise MissingFolder(f"no {kind} in {where}: it has no config.json", cure=_CURE)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """What `save_folder` was given as `config`."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a module of the right shape with the folder's weights, all of them and no other; all are finite."""
    load_model(module, str(folder / "model.safetensors"))
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise FolderError(f"{name} in {folder} has numbers that are NaN or infinite", cure="Fit it anew")


@contextmanager
def readable(where: str | Path, kind: str) -> Iterator[None]:
    """Whatever cannot be read inside is a `FolderError`; a name that is in no table stays `UnknownName`."""
    try:
        yield
    except UnknownName:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise FolderError(f"no {kind} in {where}: {type(error).__name__}: {error}", cure=_CURE) from error


def member(kind: str, name: str, table: Mapping[str, str]) -> type:
    """The class behind a name of a table of ours, imported now; `UnknownName` with the nearest one otherwise."""
    if name not in table:
        raise UnknownName(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
