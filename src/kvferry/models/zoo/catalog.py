"""Which models the zoo holds and where their folders lie.

>>> names()
('llama', 'qwen3', 'gemma3', 'qwen2')
>>> zoo_path("llama").name
'llama'
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvferry.errors import UnknownName

_WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo, in a line; `inputs` is what it reads."""

    name: str
    summary: str
    inputs: tuple[str, ...] = ("text",)

    @property
    def path(self) -> Path:
        return _WEIGHTS / self.name


CATALOG = (
    Entry("llama", "Llama: 4 layers, 2 key heads of 24; BPE of 512"),
    Entry("qwen3", "Qwen3: 4 layers, 2 key heads of 32, normalised; the tokenizer of llama"),
    Entry(
        "gemma3", "Gemma 3: 4 layers, 2 key heads of 32, a window of 64 on the first; BPE of whole phrases"
    ),
    Entry("qwen2", "Qwen2: 5 layers, 2 key heads of 32, with biases; one piece per byte"),
)


def names() -> tuple[str, ...]:
    """The names of all members."""
    return tuple(entry.name for entry in CATALOG)


def zoo_path(name: str) -> Path:
    """The folder of a member, to be given to `from_pretrained`."""
    return find(name).path


def find(name: str) -> Entry:
    """The catalogue's line about a member."""
    for entry in CATALOG:
        if entry.name == name:
            return entry
    raise UnknownName("zoo model", name, names())


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A member and its tokenizer, in fp32, ready to read."""
    return load_folder(zoo_path(name))


def load_folder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same from any folder that `train_zoo` wrote."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(path)


def list_zoo() -> Sequence[Entry]:
    """What `kvferry zoo list` shows."""
    return CATALOG
