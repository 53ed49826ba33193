"""Where results go, and files that are read: asked before the work, so that a typing error costs no minutes."""

import tempfile
from pathlib import Path

from kvferry.errors import UsageError
from kvferry.files import CURE, refuse_special


def require_readable(path: Path, verb: str) -> None:
    """A `UsageError` for a file that is missing or cannot be opened; `verb` writes such files."""
    try:
        path.open("rb").close()
    except OSError as error:
        cure = f"Name a file that kvferry {verb} has written and that you may read"
        raise UsageError(f"cannot read {path}: {error.strerror}", cure=cure) from None


def require_file(path: Path) -> None:
    """A `UsageError` where no file can be written; its folder must be there."""
    if path.is_dir():
        raise UsageError(f"cannot write {path}: Is a directory", cure=CURE)
    refuse_special(path, UsageError)
    _require_room(path.parent, path)


def require_files(*paths: Path | None) -> None:
    """The same for files whose folder is made where there is none; None is passed over."""
    for path in paths:
        if path is not None and _nearest(path.parent) == path.parent:
            require_file(path)
        elif path is not None:
            _require_room(_nearest(path.parent), path)


def require_folders(*paths: Path | None) -> None:
    """A `UsageError` where no such folder is and none can be made; None is passed over."""
    for path in paths:
        if path is not None:
            _require_room(_nearest(path), path)


def _nearest(folder: Path) -> Path:
    """The folder, or what is there on the way to it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _require_room(folder: Path, path: Path) -> None:
    """By trying: permissions say too little of a disk that is mounted to be read."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", cure=CURE) from None
