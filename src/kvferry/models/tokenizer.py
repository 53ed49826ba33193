"""A tokenizer without its model: all that a sender needs to put a cache on the receiver's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kvferry.kv import Spans
from kvferry.models.fingerprint import tokenizer_fingerprint
from kvferry.models.load import Model, load_tokenizer
from kvferry.models.tokens import encode


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and its fingerprint.

    >>> gemma = tokenizer_of("gemma3")
    >>> (spans,) = gemma.spans(["Ann has tea."])
    >>> int(spans.end[-1])
    12
    """

    hf: PreTrainedTokenizerFast
    fingerprint: str

    def spans(self, texts: Sequence[str]) -> tuple[Spans, ...]:
        """The tokens that it makes of texts in the middle of a prompt, left-padded to one length."""
        return encode(self.hf, texts).spans


def tokenizer_of(given: Model | str | Path) -> Tokenizer:
    """Of a model in the hand, or of a zoo member, a folder or a hub id, which are not loaded for it.

    Raises `UnknownName` or `FolderError` as `load` does, `ModelRefused` for a tokenizer without offsets.
    """
    hf = given.tokenizer if isinstance(given, Model) else load_tokenizer(str(given))
    return Tokenizer(hf, tokenizer_fingerprint(hf))
