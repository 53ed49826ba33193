"""A checkpoint: one file from which a training goes on as if it had never stopped.

The file replaces the one before it when it is whole, so there is a good one at any moment, also when the process is
killed or the disk fills up.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvferry.errors import FolderError, UsageError
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.tensor_file import pack_tensors, read_tensors, write_file
from kvferry.train.training_state import TrainingState

NAME = "checkpoint.safetensors"
_KIND = "kvferry checkpoint 1"
_WRITE_CURE = (
    "Free space there and run again: training goes on from the checkpoint before, which stays as it was"
)
_READ_CURE = "Delete the file to train from the start"


def has_checkpoint(folder: Path) -> bool:
    return (folder / NAME).exists()


def save_checkpoint(
    folder: Path, state: TrainingState, recipe: LoopRecipe, identity: Mapping[str, Any]
) -> None:
    """Write it whole, or raise `FolderError` and leave the one before."""
    facts = {"state": state.facts(), "recipe": asdict(recipe), "identity": identity}
    write_file(folder / NAME, pack_tensors(_KIND, state.tensors(), facts), cure=_WRITE_CURE)


def load_checkpoint(
    folder: Path, state: TrainingState, recipe: LoopRecipe, identity: Mapping[str, Any]
) -> None:
    """Bring `state` to where the folder's checkpoint was; leave it as it is where there is none.

    Raises `FolderError` for a damaged file or another module's, `UsageError` where recipe or identity are others.
    """
    if not has_checkpoint(folder):
        return
    tensors, facts = read_tensors(folder / NAME, _KIND, cure=_READ_CURE)
    for what, own in (("recipe", asdict(recipe)), ("identity", identity)):
        _require_same(folder, facts.get(what, {}), json.loads(json.dumps(own)))
    try:
        state.take(tensors, facts["state"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise FolderError(f"{folder / NAME} is of another module: {error}", cure=_READ_CURE) from None


def _require_same(folder: Path, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Going on under another recipe would be neither the one training nor the other."""
    for name in sorted({*theirs, *own}):
        if theirs.get(name) != own.get(name):
            what = (
                f"the checkpoint in {folder} was made with {name}={theirs.get(name)!r}, not {own.get(name)!r}"
            )
            raise UsageError(what, cure="Go on with what it was made with, or name another folder")
