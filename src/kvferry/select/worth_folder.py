"""Folders of a worth: `config.json` (what it was fitted for), `model.safetensors`, `README.md` (the card)."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from kvferry.errors import FolderError
from kvferry.kv import KV, Geometry
from kvferry.select.worth import Worth, WorthSettings
from kvferry.weights import find_folder, load_weights, read_config, readable, save_folder

NAME = "worth"


def save_worth(worth: Worth, settings: WorthSettings, folder: Path, card: str) -> None:
    """Write the folder whole or not at all; `FolderError` where it cannot be written."""
    save_folder(worth, folder, {"name": NAME, **asdict(settings)}, card)


def load_worth(where: str | Path, kv: KV) -> Worth:
    """The worth of a folder or hub id, for the sender of this cache.

    Raises `FolderError` for a folder that is missing, corrupt or of another kind, `ForeignModel` for another sender's.
    """
    folder = _folder(where)
    with readable(where, NAME):
        changed = tuple((folder / name).stat().st_mtime_ns for name in ("config.json", "model.safetensors"))
        settings, worth = _load(folder, kv.geometry, changed)
    settings.require(kv)
    return worth


def _folder(where: str | Path) -> Path:
    try:
        return find_folder(where, NAME)
    except FolderError as error:
        cure = "Fit one with kvferry fit-worth --out DIR, or give the hub id of one"
        raise FolderError(error.what, cure=cure) from None


@lru_cache(maxsize=4)
def _load(folder: Path, geometry: Geometry, changed: tuple[int, ...]) -> tuple[WorthSettings, Worth]:
    """Kept, because every sequence asks for it; `changed` tells a folder that was fitted anew."""
    config = read_config(folder)
    if config.pop("name") != NAME:
        raise ValueError("it holds something else")
    settings, worth = WorthSettings(**config), Worth(geometry)
    if settings.geometry == geometry.shape_digest():
        load_weights(worth, folder)
    if not all(bool(tensor.isfinite().all()) for tensor in worth.parameters()):
        raise FolderError(f"a number of {folder} is NaN or infinite", cure="Fit it anew")
    return settings, worth.eval().requires_grad_(False)
