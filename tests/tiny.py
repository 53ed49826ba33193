"""Random token sequences for the random models of `architectures`."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import architectures
from kvferry.kv import Role
from kvferry.models.geometry import read_geometry
from kvferry.models.load import Model
from kvferry.models.prompt import PLAIN
from kvferry.models.tokens import Tokens, pad, plain_spans


def model_of(name: str) -> Model:
    """A model with one word for each id; what is tested with it reads ids, not text."""
    hf = architectures.build(name)
    words = Tokenizer(WordLevel({str(i): i for i in range(architectures.VOCABULARY)}, unk_token="0"))
    return Model(
        name, hf, PreTrainedTokenizerFast(tokenizer_object=words), read_geometry(hf, "0" * 64), PLAIN
    )


def tokens_of(rows: list[list[int]]) -> Tokens:
    return pad([(ids, plain_spans(len(ids), Role.TEXT)) for ids in rows])


def random_rows(n_rows: int, n_tokens: int) -> list[list[int]]:
    return torch.randint(3, architectures.VOCABULARY, (n_rows, n_tokens)).tolist()
