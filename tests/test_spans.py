"""Tokens of two models correspond by the bytes they stand for: no byte lost, none counted twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from contract import ORDINARY, cache
from kvferry.align.pooling import POOLINGS, pool, pooling_weights
from kvferry.align.spans import overlap, overlaps, same_place, shared_bytes
from kvferry.errors import EmptyContext, ShapeMismatch, UnknownName, WrongKeySpace
from kvferry.kv import KV, Group, Role, Spans
from kvferry.models.capture import capture
from kvferry.models.load import load
from kvferry.models.tokens import byte_ranges, encode

CORPUS = [
    "Ann keeps the ring in the barn. Bob met Cleo. " * 20,
    "Grüße aus 北京 und Zürich 🎈 an alle. " * 20,
]
LETTERS = "ab eéü 北京🎈👩‍👧.\n"
TEXTS = st.text(st.sampled_from(LETTERS), min_size=1, max_size=40)


def byte_level_bpe(n_merges: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: several tokens may share one character."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def character_bpe(n_merges: int, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """One token for each character, or some merged; unknown ones are `<unk>`."""
    alphabet = sorted({*"".join(CORPUS), *LETTERS, "▁"})
    backend = Tokenizer(BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = BpeTrainer(
        vocab_size=1 + len(alphabet) + n_merges,
        initial_alphabet=alphabet,
        special_tokens=["<unk>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


SENTENCE_PIECE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "bytes": byte_level_bpe(0),
    "small": byte_level_bpe(40),
    "large": byte_level_bpe(150),
    "characters": character_bpe(0),
    "pieces": character_bpe(60, SENTENCE_PIECE),
    "folding": character_bpe(0, normalizers.NFKC()),
}
TWO = st.tuples(*[st.sampled_from(sorted(TOKENIZERS))] * 2)


def spans_of(name: str, text: str) -> Spans:
    return encode(TOKENIZERS[name], [text]).spans[0]


def made(*tokens: tuple[int, int] | Role, part: int = 0) -> Spans:
    """Text tokens of given bytes, and tokens of other roles."""
    rows = [(*token, Role.TEXT) if isinstance(token, tuple) else (0, 0, token) for token in tokens]
    start, end, role = np.array(rows, np.int32).reshape(-1, 3).T
    return Spans(np.full(len(rows), part, np.int32), start.copy(), end.copy(), role.astype(np.uint8))


def joined(*parts: Spans) -> Spans:
    names = ("part", "start", "end", "role")
    return Spans(*(np.concatenate([getattr(spans, name) for spans in parts]) for name in names))


def cache_on(*rows: Spans, seed: int = 0) -> KV:
    """Random numbers on these tokens, left-padded; the padding is not present and holds NaN."""
    width = max(len(row) for row in rows)
    wide = tuple(row.widen(width) for row in rows)
    held = torch.tensor(np.stack([row.role != Role.PAD for row in wide]))
    present = held.expand(len(ORDINARY), -1, -1).clone()
    kv = cache(n_tokens=width, n_batch=len(rows), present=present, spans=wide, seed=seed)
    for states in numbers(kv):
        states.masked_fill_(~present[:, :, None, :, None], torch.nan)
    return kv


def numbers(kv: KV) -> list[torch.Tensor]:
    return [part for group in kv.groups for part in (group.keys, group.values)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_spans_tile_the_bytes_of_a_text(name, text):
    spans = spans_of(name, text)
    assert spans.start[0] == 0 and spans.end[-1] == len(text.encode())
    assert np.array_equal(spans.start[1:], spans.end[:-1])
    assert set(spans.role) == {Role.TEXT}


@given(text=TEXTS)
@pytest.mark.parametrize(("one", "other"), [("bytes", "large"), ("large", "bytes"), ("small", "characters")])
def test_weights_sum_to_one_and_no_byte_is_lost(one, other, text):
    a, b = spans_of(one, text), spans_of(other, text)
    weights = overlap(a, b)
    assert np.allclose(weights[a.end > a.start].sum(1), 1, atol=1e-6)
    carried = (weights * (a.end - a.start)[:, None]).sum(0)
    assert np.allclose(carried, b.end - b.start, atol=1e-4)
    assert np.array_equal(overlaps((a,), (b,))[0].numpy(), weights)


@given(names=TWO, text=TEXTS)
def test_every_pooling_reads_every_token_with_weights_of_sum_one(names, text):
    target, source = (spans_of(name, text) for name in names)
    wide = target.end > target.start
    by_bytes, mean, last = (pooling_weights(target, source, how) for how in ("weighted", "mean", "last"))
    for weights in (by_bytes, mean, last):
        assert np.allclose(weights[wide].sum(1), 1, atol=1e-6)
    assert np.array_equal(by_bytes > 0, mean > 0)
    carried = (by_bytes * (target.end - target.start)[:, None]).sum(0)
    assert np.allclose(carried, source.end - source.start, atol=1e-4)
    for row in np.flatnonzero(wide):
        assert last[row].argmax() == np.flatnonzero(by_bytes[row]).max()
        assert set(mean[row]) <= {0, np.float32(1 / (by_bytes[row] > 0).sum())}


def test_pooling_by_hand():
    target, source = made((0, 4), (4, 6)), made((0, 1), (1, 5), (5, 6))
    assert pooling_weights(target, source, "weighted").tolist() == [[0.25, 0.75, 0], [0, 0.5, 0.5]]
    assert pooling_weights(target, source, "mean").tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert pooling_weights(target, source, "last").tolist() == [[0, 1, 0], [0, 0, 1]]
    kv = cache_on(source)
    keys, (pooled, _) = kv.layer(1)[0], pool(kv, [target], "weighted").layer(1)
    assert torch.allclose(pooled[..., 0, :], 0.25 * keys[..., 0, :] + 0.75 * keys[..., 1, :])
    assert torch.allclose(pooled[..., 1, :], 0.5 * keys[..., 1, :] + 0.5 * keys[..., 2, :])


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=20)
def test_equal_tokenizers_give_the_identity(name, how, text):
    spans = spans_of(name, text)
    assert np.array_equal(pooling_weights(spans, spans, how), np.eye(len(spans), dtype=np.float32))
    kv = cache_on(spans)
    same = pool(kv, [spans], how)
    assert same.present.all() and torch.equal(same.positions, kv.positions)
    assert all(torch.equal(one, other) for one, other in zip(numbers(same), numbers(kv), strict=True))


def test_overlap_with_itself_is_the_identity():
    spans = spans_of("small", "Ann keeps 北京 in the barn 🎈.")
    assert np.array_equal(overlap(spans, spans), np.eye(len(spans), dtype=np.float32))


@given(text=st.text(st.sampled_from("aﬃ﷽ é"), min_size=1, max_size=6))
def test_pieces_of_one_normalised_character_keep_their_places(text):
    """ "﷽" is 3 bytes and becomes 18 characters: most of their tokens stand for no byte."""
    spans = spans_of("folding", text)
    assert spans.start[0] == 0 and spans.end[-1] == len(text.encode())
    assert np.array_equal(pooling_weights(spans, spans), np.eye(len(spans), dtype=np.float32))


@given(names=TWO, text=TEXTS)
def test_shared_bytes_are_what_the_definition_says(names, text):
    a, b = (spans_of(name, text) for name in names)
    found = shared_bytes(a, b)
    common = np.clip(np.minimum.outer(a.end, b.end) - np.maximum.outer(a.start, b.start), 0, None)
    rows, columns = common.nonzero()
    assert np.array_equal(found.rows, rows) and np.array_equal(found.columns, columns)
    assert np.array_equal(found.n_bytes, common[rows, columns])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=8))
def test_spans_may_overlap_and_stand_in_any_order(places):
    """Some tokenizers give a character to two tokens at once."""
    spans = made(*[(start, start + width) for start, width in places])
    other = made((0, 3), (3, 3), (3, 8), (8, 20))
    common = np.clip(
        np.minimum.outer(spans.end, other.end) - np.maximum.outer(spans.start, other.start), 0, None
    )
    for rows, columns, want in ((spans, other, common), (other, spans, common.T)):
        found = shared_bytes(rows, columns)
        dense = np.zeros_like(want)
        dense[found.rows, found.columns] = found.n_bytes
        assert np.array_equal(dense, want) and (np.diff(found.rows) >= 0).all()


@given(text=TEXTS, seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_the_order_of_the_source_tokens_does_not_matter(text, seed):
    target, source = spans_of("large", text), spans_of("characters", text)
    kv, order = cache_on(source), torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    for how in POOLINGS:
        one, other = pool(kv, [target], how), pool(kv.take_tokens(order), [target], how)
        assert all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))
        back = torch.argsort(order).numpy()
        turned = pool(kv, [target.take(np.arange(len(target))[::-1])], how)
        assert torch.equal(turned.layer(0)[0].flip(2), one.layer(0)[0])
        assert np.array_equal(
            pooling_weights(target, source.take(order.numpy()), how)[:, back],
            pooling_weights(target, source, how),
        )


@given(texts=st.lists(TEXTS, min_size=2, max_size=3))
@settings(max_examples=20)
def test_a_batch_gives_what_its_members_give_alone(texts):
    targets = [spans_of("pieces", text) for text in texts]
    sources = [spans_of("small", text) for text in texts]
    batch = cache_on(*sources)
    for how in POOLINGS:
        together = pool(batch, targets, how)
        for alone, target, got in zip(batch.sequences(), targets, together.sequences(), strict=True):
            single = next(pool(alone, [target], how).sequences())
            assert torch.equal(got.positions, single.positions)
            assert all(torch.equal(a, b) for a, b in zip(numbers(got), numbers(single), strict=True))


def test_a_slot_is_present_where_all_that_it_takes_is():
    target, source = made((0, 4), (4, 6), (6, 9)), made((0, 1), (1, 5), (5, 6))
    kv = cache_on(source)
    kv.present[1, 0, 0] = False
    for group in kv.groups:
        group.keys[1, :, :, 0] = torch.nan
    pooled = pool(kv, [target])
    assert pooled.present[:, 0].tolist() == [[True, True, False], [False, True, False], [True, True, False]]
    assert all(part.isfinite().all() for part in numbers(pooled))
    assert pooled.layer(1)[0][..., 0, :].abs().sum() == 0
    assert pool(kv, [target], "last").present[1, 0].tolist() == [True, True, False]


def test_special_and_template_tokens_correspond_by_role_and_rank_in_each_section():
    bos, word = Role.SPECIAL, Role.TEMPLATE
    one = joined(made(bos, bos, word, (0, 3)), made(word, bos))
    other = joined(made(bos, word, word, (0, 1), (1, 3)), made(word, bos, bos))
    weights = pooling_weights(one, other)
    pairs = {(int(row), int(column)) for row, column in zip(*weights.nonzero(), strict=True)}
    assert pairs == {(0, 0), (2, 1), (3, 3), (3, 4), (4, 5), (5, 6)}
    assert overlap(one, other)[[0, 1, 2, 4, 5]].sum() == 0  # text alone
    assert same_place(one, other).rows.tolist() == [0, 2, 4, 5]


def test_parts_do_not_mix():
    word = Role.TEMPLATE
    one = joined(made(word, (0, 2), word, word), made((0, 2), word, part=1))
    other = joined(made((0, 2), word), made((0, 2), word, word, part=1))
    assert [(int(i), int(j)) for i, j in zip(*pooling_weights(one, other).nonzero(), strict=True)] == [
        (1, 0),
        (2, 1),
        (4, 2),
        (5, 3),
    ]
    two = joined(made((0, 4)), made(Role.TEMPLATE), made((0, 4), part=1))
    assert np.array_equal(pooling_weights(two, two), np.eye(3, dtype=np.float32))
    assert pooling_weights(made((0, 4)), made((0, 4), part=1)).sum() == 0


def test_patches_correspond_to_the_same_patch_only():
    patches = made((0, 3), (3, 6), (6, 9))
    patches.role[:] = Role.PATCH
    assert np.array_equal(pooling_weights(patches, patches), np.eye(3, dtype=np.float32))
    assert pooling_weights(patches, patches.take(np.array([1])))[:, 0].tolist() == [0, 1, 0]


def test_padding_tokens_pair_with_nothing():
    rows = encode(TOKENIZERS["small"], ["Ann", "Ann met Bob."])
    padded, other = rows.spans
    assert padded.role[0] == Role.PAD
    for weights in (overlap(padded, other), pooling_weights(padded, other), pooling_weights(padded, padded)):
        assert weights[padded.role == Role.PAD].sum() == 0


def test_tokens_that_share_a_character_share_its_bytes_in_order():
    start, end = byte_ranges("🎈x", [(0, 1), (0, 1), (0, 1), (0, 1), (1, 2)])
    assert list(zip(start, end, strict=True)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_the_dummy_space_of_a_normaliser_is_no_token_of_the_text():
    """A lone "▁" has the offsets of the first character and would count its byte twice."""
    tokenizer = character_bpe(0, SENTENCE_PIECE)
    assert tokenizer("éa", return_offsets_mapping=True)["offset_mapping"][0] == (0, 1)
    for text in ("éa", " éa"):
        spans = encode(tokenizer, [text]).spans[0]
        borders = list(zip(spans.start, spans.end, strict=True))
        assert borders == [(n, n + len(char.encode())) for n, char in _characters(text)]


def _characters(text: str) -> list[tuple[int, str]]:
    return [(len(text[:i].encode()), char) for i, char in enumerate(text)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_keep_their_type_and_the_caches_own_lists_are_not_needed(dtype):
    spans = spans_of("small", "Bob met Cleo.")
    kv = cache_on(spans)
    groups = tuple(Group(g.layers, g.keys, g.values.to(dtype)) for g in kv.groups)
    same = pool(kv.with_groups(groups), [spans])
    assert same.groups[0].values.dtype == dtype and torch.equal(same.groups[0].values, groups[0].values)


def test_a_cache_moves_to_the_other_models_tokens():
    """Head to head, text to text, and every token of the target is held."""
    llama, gemma = load("llama"), load("gemma3")
    texts = ["Ann keeps the ring in the barn.", "Bob has the salt and the rope."]
    kv, targets = capture(llama, texts).kv, gemma.contexts(texts).spans
    pooled = pool(kv, targets)
    held = np.stack([row.role == Role.TEXT for row in targets])
    assert pooled.n_tokens == len(targets[0]) != kv.n_tokens
    assert pooled.geometry == kv.geometry
    assert all((got.end == want.end).all() for got, want in zip(pooled.spans, targets, strict=True))
    assert pooled.present[0][torch.from_numpy(held)].all()
    last = [int(row.nonzero()[0][-1]) for row in held]
    ends = [int((spans.role == Role.TEXT).nonzero()[0][-1]) for spans in kv.spans]
    taken = pool(kv, targets, "last").layer(0)[1]
    for row in range(2):
        assert torch.equal(taken[row, :, last[row]], kv.layer(0)[1][row, :, ends[row]])


def test_what_cannot_be_pooled_is_refused():
    spans = made((0, 2), (2, 3))
    kv = cache_on(spans)
    with pytest.raises(WrongKeySpace):
        pool(replace(kv, space="rotated"), [spans])
    with pytest.raises(ShapeMismatch, match="2 of 1"):
        pool(kv, [spans, spans])
    with pytest.raises(EmptyContext):
        pool(cache(n_tokens=0), [spans])
    with pytest.raises(UnknownName, match="mean"):
        pool(kv, [spans], "maen")
    assert pool(kv, [made()]).n_tokens == 0
