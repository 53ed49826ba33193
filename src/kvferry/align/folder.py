"""Aligner folders: `config.json` (name and contract), `model.safetensors`, `README.md` (the card)."""

from pathlib import Path

from kvferry.align.contract import Aligner, Contract, from_json, to_json
from kvferry.align.table import ALIGNERS
from kvferry.weights import find_folder, load_weights, member, read_config, readable, save_folder


def save_aligner(aligner: Aligner, folder: Path, card: str) -> None:
    """Write the folder beside its place, then move it there: a reader never sees half of it."""
    contract = to_json(aligner.contract)
    config = {"name": aligner.name, "options": aligner.options(), "contract": contract}
    save_folder(aligner, folder, config, card)


def load_aligner(where: str | Path) -> Aligner:
    """Load a folder or hub id. Raises `FolderError` for one that is missing, corrupt or of another kind."""
    folder = aligner_folder(where)
    with readable(where, "aligner"):
        config = read_config(folder)
        aligner = aligner_class(config["name"])(from_json(config["contract"]), **config["options"])
        load_weights(aligner, folder)
        return aligner.eval()


def load_contract(where: str | Path) -> Contract:
    """What the aligner of a folder or hub id promises, without its weights. Raises as `load_aligner` does."""
    folder = aligner_folder(where)
    with readable(where, "aligner"):
        return from_json(read_config(folder)["contract"])


def aligner_class(name: str) -> type[Aligner]:
    """The class behind the name in a folder; only names of our own table are looked up."""
    return member("aligner", name, ALIGNERS)


def aligner_folder(where: str | Path) -> Path:
    """The folder itself, or that of a hub id, fetched; `FolderError` where there is none."""
    return find_folder(where, "aligner")
