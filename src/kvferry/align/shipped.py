"""The aligners that come with the package, between members of the zoo."""

import json
from pathlib import Path

from kvferry.errors import UnknownName

_FOLDER = Path(__file__).parent.parent / "aligners"


def names() -> list[str]:
    """Names of the form `sender-to-receiver`."""
    return sorted(path.name for path in _FOLDER.iterdir() if (path / "config.json").is_file())


def aligner_path(sender: str, receiver: str) -> Path:
    """The folder of the aligner between two zoo members; `UnknownName` where none is shipped."""
    name = f"{sender}-to-{receiver}"
    if name not in names():
        raise UnknownName("shipped aligner", name, names())
    return _FOLDER / name


def coded_with(name: str) -> list[str]:
    """The codecs that a shipped aligner covers, from its folder."""
    config = json.loads((_FOLDER / name / "config.json").read_text(encoding="utf-8"))
    return config["contract"]["coded_with"]
