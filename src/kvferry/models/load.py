"""A model in the hand: weights, tokenizer, geometry and prompt form, read once."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from kvferry.errors import FolderError, MissingFolder, UnknownName, UsageError
from kvferry.kv import Geometry, Role
from kvferry.models.fingerprint import tokenizer_fingerprint
from kvferry.models.geometry import read_geometry
from kvferry.models.prompt import Prompt, prompt_of
from kvferry.models.tokens import Tokens, encode, join, pad, plain_spans
from kvferry.models.zoo.catalog import names as zoo_names
from kvferry.models.zoo.catalog import zoo_path

DTypeName = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Model:
    """A decoder-only Hugging Face model with all that kvferry needs to know about it."""

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    geometry: Geometry
    prompt: Prompt
    exclusive: contextlib.AbstractContextManager[bool] = field(
        default_factory=threading.RLock, repr=False, compare=False
    )
    """Held during a forward pass, because attention is rerouted while it runs."""

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        found = self.hf.generation_config.eos_token_id if self.hf.generation_config else None
        found = self.hf.config.get_text_config(decoder=True).eos_token_id if found is None else found
        many = found if isinstance(found, list) else [found]
        return frozenset(number for number in [*many, self.tokenizer.eos_token_id] if isinstance(number, int))

    @cached_property
    def head(self) -> Tokens:
        """Begin-of-sequence token and template head, one row."""
        found = encode(self.tokenizer, [self.prompt.head])
        ids = found.ids[0].tolist()
        special = set(self.tokenizer.all_special_ids)
        spans = plain_spans(len(ids), Role.TEMPLATE)
        spans.role[[number in special for number in ids]] = Role.SPECIAL
        return pad([(ids, spans)])

    def heads(self, n: int) -> Tokens:
        """The head, `n` times."""
        return Tokens(self.head.ids.expand(n, -1), self.head.mask.expand(n, -1), self.head.spans * n)

    def contexts(self, texts: list[str]) -> Tokens:
        """Head and context, as the model reads them before a question."""
        return join(self.heads(len(texts)), encode(self.tokenizer, texts))

    def questions(self, texts: list[str]) -> Tokens:
        """What follows the context, as text made by `prompt.question`."""
        return encode(self.tokenizer, texts, Role.TEMPLATE)


def load(
    name: str, *, dtype: DTypeName = "auto", device: str = "auto", prompt: Prompt | None = None
) -> Model:
    """Load a zoo member (`"llama"`), a local folder or a hub id (`"Qwen/Qwen3-0.6B"`).

    Raises `UnknownName` or `MissingFolder` for a name that is none of them, `FolderError` for a folder that holds no
    model, `ModelRefused` for a model kvferry cannot carry.
    """
    where = _locate(name)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        cure = "Give a Hugging Face folder or hub id of a decoder-only model"
        raise MissingFolder(f"there is no model in {name!r}: it has no config.json", cure=cure)
    with _readable(name, "a decoder-only model"):
        tokenizer = AutoTokenizer.from_pretrained(where)
        hf = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    hf.to(_device(device))  # type: ignore[arg-type]
    return wrap(hf, tokenizer, name=name, prompt=prompt)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer alone of what `load` takes; a folder need not hold more than it.

    Raises `UnknownName` or `FolderError`.
    """
    where = _locate(name)
    with _readable(name, "a model or a tokenizer"):
        return AutoTokenizer.from_pretrained(where)


def wrap(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, name: str = "", prompt: Prompt | None = None
) -> Model:
    """Make a `Model` of a transformers model and tokenizer that are loaded already."""
    hf.eval()
    geometry = read_geometry(hf, tokenizer_fingerprint(tokenizer))
    return Model(name or str(hf.config.name_or_path), hf, tokenizer, geometry, prompt or prompt_of(tokenizer))


def public_name(model: str) -> str:
    """A model's name for cards and reports, without the folders it lies in."""
    return Path(model).name if Path(model).is_dir() else model


def _locate(name: str) -> str:
    if name in zoo_names():
        return str(zoo_path(name))
    if Path(name).is_dir():
        return name
    if "/" not in name:
        raise UnknownName("model", name, zoo_names())
    cure = "Give a zoo name, a Hugging Face folder or a hub id"
    try:
        snapshot_download(name, allow_patterns="config.json")  # transformers would try for a minute
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise MissingFolder(f"there is no model {name!r}, here or on the hub", cure=cure) from error
    return name


@contextlib.contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    """No progress bar for reading a file, and a `FolderError` where it is not what it should be."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        cure = f"Give a Hugging Face folder or hub id of {what}"
        raise FolderError(f"cannot load {name!r}: {_first_line(error)}", cure=cure) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", cure="Use auto, cpu, cuda or cuda:N") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
