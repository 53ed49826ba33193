"""The three tokenizers of the zoo: `bytes`, `words` (BPE, 512) and `phrases` (a larger BPE, up to three words a piece).

All put BOS before a text, encode any UTF-8, keep exact offsets, and give an answer the same pieces everywhere.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import product

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.decoders import Decoder
from transformers import PreTrainedTokenizerFast

from kvferry.models.zoo.kinds import KINDS
from kvferry.models.zoo.words import FILLERS
from kvferry.models.zoo.worlds import make_document

PAD, BOS, EOS = SPECIALS = ("<pad>", "<bos>", "<eos>")
MAX_POSITIONS = 1024

_SPACE = "▁"
_WORD = "[A-Za-z]+"


def byte_tokenizer() -> Tokenizer:
    """One piece per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(tokenizer, decoders.ByteLevel())


def word_tokenizer() -> Tokenizer:
    """Byte-level BPE of 512 pieces inside words, in the manner of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _train(tokenizer, 512, list(SPECIALS), alphabet)
    return _finished(tokenizer, decoders.ByteLevel())


def phrase_tokenizer() -> Tokenizer:
    """BPE with byte fallback, in the manner of SentencePiece; up to three function words in a row are one piece."""
    glue = f"(?:{'|'.join(sorted(_function_words()))})(?!{_WORD})"
    phrase = f"(?:Q:{_SPACE})?{_SPACE}?{glue}(?:{_SPACE}{glue}){{0,2}}"
    pattern = rf"\?\nA:|{phrase}|{_SPACE}?{_WORD}|{_SPACE}?[^A-Za-z\n{_SPACE}]|\n|{_SPACE}"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fallback = [f"<0x{high}{low}>" for high, low in product("0123456789ABCDEF", repeat=2)]
    _train(tokenizer, 1000, [*SPECIALS, *fallback], [])
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return _finished(tokenizer, decoders.Sequence(parts))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "words": word_tokenizer,
    "phrases": phrase_tokenizer,
}


def special_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """PAD, BOS, EOS."""
    pad, bos, eos = (tokenizer.encode(token, add_special_tokens=False).ids[0] for token in SPECIALS)
    return pad, bos, eos


def line_end(tokenizer: Tokenizer) -> int:
    """The piece that ends an answer."""
    return tokenizer.encode("\n", add_special_tokens=False).ids[0]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _train(tokenizer: Tokenizer, size: int, first: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)


def _corpus(n_documents: int = 1000) -> Iterator[str]:
    """Mostly places: their words are asked for."""
    for seed, kind in product(
        range(n_documents), ("place", "place", "place", "needle", "two_hop", "met", "count")
    ):
        yield make_document(seed, kind=kind, n_facts=8, n_fillers=2 * (kind == "needle"), n_questions=4).text


def _function_words() -> set[str]:
    """The words of sentences and questions that are neither asked for nor given."""
    forms = [form.template for kind in KINDS.values() for form in kind.forms + kind.drills]
    sentences = [sentence for kind in KINDS.values() for sentence in kind.sentences]
    return set(re.findall(_WORD, re.sub("{.*?}", "", " ".join([*forms, *sentences, *FILLERS]))))


def _finished(tokenizer: Tokenizer, decoder: Decoder) -> Tokenizer:
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer
