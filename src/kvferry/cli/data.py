"""What is read by the name behind `--data`: all that fits know, and the stories of the shared folder."""

from pathlib import Path

from kvferry.lab.align.passages import pair_of
from kvferry.models.load import Model
from kvferry.train.examples import Source, source_of

STORIES = "stories"


def source_named(where: Path | str | None, sender: Model, receiver: Model) -> Source:
    """`stories` are passages that both models can hold, of stories that no benchmark tests on.

    Raises `FolderError` for stories without a shared folder, and what `source_of` raises.
    """
    if str(where) == STORIES:
        return pair_of(sender, receiver)
    return source_of(where, receiver.prompt)
