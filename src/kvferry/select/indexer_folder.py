"""Indexer folders: `config.json` (its model and shape), `model.safetensors`, `README.md` (the card)."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from kvferry.errors import FolderError
from kvferry.kv import Geometry
from kvferry.select.indexer import Indexer, IndexerShape, require_model
from kvferry.weights import find_folder, load_weights, read_config, readable, save_folder

NAME = "lightning"


def save_indexer(indexer: Indexer, folder: Path, card: str) -> None:
    """Write the folder whole or not at all; `FolderError` where it cannot be written."""
    geometry, shape = indexer.geometry, indexer.shape
    bound = {"model": geometry.model, "geometry": geometry.shape_digest(), "tokenizer": geometry.tokenizer}
    save_folder(indexer, folder, {"name": NAME, **bound, **asdict(shape)}, card)


def load_indexer(where: str | Path, geometry: Geometry, device: torch.device | str = "cpu") -> Indexer:
    """The indexer of a folder or hub id, for this model.

    Raises `FolderError` for a folder that is missing, corrupt or of another kind, `ForeignModel` for an indexer of
    another model.
    """
    folder = find_folder(where, "indexer")
    with readable(where, "indexer"):
        changed = tuple((folder / name).stat().st_mtime_ns for name in ("config.json", "model.safetensors"))
        return _load(folder, geometry, torch.device(device), changed)


@lru_cache(maxsize=4)
def _load(folder: Path, geometry: Geometry, device: torch.device, changed: tuple[int, ...]) -> Indexer:
    """Kept, because every sequence asks for it; `changed` tells a folder that was fitted anew."""
    config = read_config(folder)
    if config["name"] != NAME:
        raise ValueError(f"it holds {config['name']!r}")
    require_model(geometry, config["model"], config["geometry"], config["tokenizer"])
    indexer = Indexer(geometry, IndexerShape(config["hidden"], config["heads"], config["dim"]))
    load_weights(indexer, folder)
    if not all(bool(tensor.isfinite().all()) for tensor in indexer.parameters()):
        raise FolderError(f"a weight of {folder} is NaN or infinite", cure="Fit the indexer anew")
    return indexer.to(device).eval().requires_grad_(False)
