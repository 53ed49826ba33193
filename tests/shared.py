"""The shared folder: pretrained models and texts by others, used for tests and never part of the project."""

import os
from pathlib import Path

VARIABLE = "KVFERRY_SHARED"


def expected() -> Path:
    """Where the variable says, or beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get(VARIABLE, beside))


def find() -> Path | None:
    """The folder, if it is there and holds models."""
    folder = expected()
    return folder if (folder / "models").is_dir() else None
