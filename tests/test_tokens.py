"""Texts that stand in the middle of a prompt, for tokenizers that put a space before everything."""

import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kvferry.models.load import load
from kvferry.models.tokens import encode


@pytest.fixture
def sentencepiece_like():
    pieces = {piece: i for i, piece in enumerate(["<unk>", "▁a", "▁", "▁▁a"])}
    backend = Tokenizer(WordLevel(pieces, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_dummy_space_stands_for_the_texts_own(sentencepiece_like):
    found = encode(sentencepiece_like, [" a"])
    assert sentencepiece_like.convert_ids_to_tokens(found.ids[0].tolist()) == ["▁a"]
    assert (found.spans[0].start.tolist(), found.spans[0].end.tolist()) == ([0], [2])


def test_a_lone_space_is_kept(sentencepiece_like):
    assert encode(sentencepiece_like, [" "]).ids.shape == (1, 1)


@pytest.mark.parametrize(
    "name", ["stories260K", "llama2xs", "tinystories656K", "babyllama105", "babyllama361"]
)
def test_a_continuation_is_read_as_in_the_whole(shared_dir, name):
    tokenizer = load(str(shared_dir / "models" / name)).tokenizer
    start, end = "Once upon a time,", " there was a little girl."
    whole = encode(tokenizer, [start + end])
    parts = [encode(tokenizer, [part]) for part in (start, end)]
    if name == "tinystories656K":  # its pieces cross the border of words
        assert parts[1].spans[0].start[0] == 0 and parts[1].spans[0].end[-1] == len(end)
    else:
        assert [*parts[0].ids[0].tolist(), *parts[1].ids[0].tolist()] == whole.ids[0].tolist()
    assert (parts[1].spans[0].end[:-1] == parts[1].spans[0].start[1:]).all()
