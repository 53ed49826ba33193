"""Fusers by name, fresh or from a folder of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from kvferry.fuse.contract import Fuser
from kvferry.fuse.table import FUSERS
from kvferry.kv import Geometry
from kvferry.weights import find_folder, load_weights, member, read_config, readable, save_folder

_GEOMETRY = TypeAdapter(Geometry)


def fuser_class(name: str) -> type[Fuser]:
    """The class behind a name; `UnknownName` with the nearest one otherwise."""
    return member("fuser", name, FUSERS)


def make_fuser(
    name: str, sender: Geometry, receiver: Geometry, options: Mapping[str, Any] | None = None
) -> Fuser:
    """A fresh, trainable fuser between two geometries: `options` are the constructor's, defaults fill the rest.

    It learns by `loss.backward()` alone; call `fuser.train()` and `fuser.anneal(share of training done)` meanwhile.
    """
    return fuser_class(name)(sender, receiver, **options or {})


def save_fuser(fuser: Fuser, folder: Path, card: str) -> None:
    """Write the folder beside its place, then move it there."""
    geometries = {"sender": fuser.sender, "receiver": fuser.receiver}
    config = {"name": fuser.name, "options": fuser.options(), "coded_with": list(fuser.coded_with)}
    dumped = {side: _GEOMETRY.dump_python(geometry, mode="json") for side, geometry in geometries.items()}
    save_folder(fuser, folder, {**config, **dumped}, card)


def load_fuser(where: str | Path) -> Fuser:
    """Load a folder or hub id. Raises `FolderError` for one that is missing, corrupt or of another kind."""
    folder = find_folder(where, "fuser")
    with readable(where, "fuser"):
        config = read_config(folder)
        sender, receiver = (_GEOMETRY.validate_python(config[side]) for side in ("sender", "receiver"))
        fuser = make_fuser(config["name"], sender, receiver, config["options"])
        fuser.coded_with = tuple(str(codec) for codec in config.get("coded_with", []))
        load_weights(fuser, folder)
        return fuser.eval()
