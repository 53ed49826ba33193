"""Held-out text as token ids: stories of the shared folder for pretrained models, documents of facts for the zoo.

Rule 1: calibration and test never share a text. Stories come from two files, and a story of the test file that the
other file holds too is left out; documents come from two splits of the worlds.
Rule 2: a message begins where a story or document begins, after the model's own head.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.errors import FolderError, UsageError
from kvferry.models.load import Model
from kvferry.models.tokens import encode
from kvferry.models.zoo.catalog import names as zoo_names
from kvferry.models.zoo.worlds import make_document

Split = Literal["calibration", "test"]

SHARED = "KVFERRY_SHARED"
_STORIES = {"calibration": "tinystories_cased_a.txt", "test": "tinystories_cased_b.txt"}
_N_SAME = 100  # stories that agree in so many characters are one story
_MAX_CHARACTERS = 12  # of a token, on average
_N_FACTS = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)


def shared_folder() -> Path | None:
    """Where pretrained models and texts by others lie: `$KVFERRY_SHARED`, else `shared` beside the project."""
    beside = Path(__file__).resolve().parents[5] / "shared"
    folder = Path(os.environ.get(SHARED, beside))
    return folder if (folder / "models").is_dir() else None


def shared_models() -> list[str]:
    """Folders of the pretrained models, in order of name."""
    folder = shared_folder()
    return sorted(str(path.parent) for path in folder.glob("models/*/config.json")) if folder else []


def passages(
    model: Model, n: int, *, prefix: int, after: int, split: Split = "test"
) -> Int[Tensor, "batch tokens"]:
    """`n` passages of `prefix + after` tokens, head included. `UsageError` where the text does not suffice."""
    length = prefix + after
    texts = _documents(model, prefix, length, split) if model.name in zoo_names() else _stories(model, split)
    head = model.head.ids[0].tolist()
    found: list[list[int]] = []
    for text in texts:
        ids = [*head, *encode(model.tokenizer, [text]).ids[0].tolist()]
        found += [ids[:length]] if len(ids) >= length else []
        if len(found) == n:
            return torch.tensor(found)
    cure = "Ask for fewer messages, or shorter ones"
    raise UsageError(f"the text holds {len(found)} passages of {length} tokens, {n} are needed", cure=cure)


def _stories(model: Model, split: Split) -> list[str]:
    """Stories with the paragraph break that the model knows: a newline, or a space where newline is no token."""
    unknown = model.tokenizer.unk_token_id
    ids = encode(model.tokenizer, ["a\nb"]).ids[0].tolist()
    gap = " " if unknown is not None and unknown in ids else "\n"
    return [re.sub(r"\s*\n\s*", gap, story) for story in _read_stories(split)]


@cache
def _read_stories(split: Split) -> tuple[str, ...]:
    stories = _split_stories(_STORIES[split])
    if split == "calibration":
        return stories
    known = {story[:_N_SAME] for story in _split_stories(_STORIES["calibration"])}
    return tuple(story for story in stories if story[:_N_SAME] not in known)


@cache
def _split_stories(name: str) -> tuple[str, ...]:
    folder = shared_folder()
    path = (folder or Path()) / "data" / "text" / name
    if not path.is_file():
        cure = f"Let ${SHARED} name the shared folder, or bench models of the zoo"
        raise FolderError(f"there is no text to read: data/text/{name} is missing", cure=cure)
    parts = re.split(r"\n+(?=Once upon a time)", path.read_text(encoding="utf-8"))
    stories = [part for part in parts[1:] if part.isascii()]
    return tuple({story[:_N_SAME]: story for story in stories}.values())


def _documents(model: Model, prefix: int, length: int, split: Split) -> Iterator[str]:
    """Endless documents whose facts fill the prefix as far as possible; questions and answers follow."""
    side = "test" if split == "test" else "dev"
    n_facts = next(n for n in _N_FACTS if _n_tokens(model, n) <= prefix or n == 1)
    seeds = count()
    for kind in cycle(("place", "met")):
        text = ""
        while len(text) < _MAX_CHARACTERS * length:  # more documents where one is too short
            text += make_document(next(seeds), kind=kind, n_facts=n_facts, split=side).text
        yield text


def _n_tokens(model: Model, n_facts: int) -> int:
    document = make_document(0, n_facts=n_facts, n_questions=1, split="dev")
    context = document.text.split("\n")[0]
    return model.head.ids.shape[1] + encode(model.tokenizer, [context]).ids.shape[1]
