"""The decode loop: greedy equals transformers, rows end on their own, nothing that may be a stop string is streamed."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.errors import UsageError
from kvferry.models.generate import GREEDY, Answer, Sampling, _Writer, generate, pick
from kvferry.models.load import load
from kvferry.models.state import empty, read
from kvferry.models.tokens import join
from kvferry.models.zoo.worlds import make_item


@pytest.fixture(scope="module")
def model():
    return load("qwen3")


def prompts(model, n, n_facts=4):
    items = [make_item(i, n_facts=n_facts, n_fillers=i) for i in range(n)]
    asked = model.questions([model.prompt.question(item.question) for item in items])
    return items, join(model.contexts([item.context for item in items]), asked)


def test_greedy_equals_transformers(model):
    _, tokens = prompts(model, 1)
    state = empty(model)
    got = generate(state, read(state, tokens)[:, -1], max_new_tokens=6)[0]
    want = model.hf.generate(tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=6, do_sample=False)
    want = [number for number in want[0, tokens.ids.shape[1] :].tolist() if number not in model.stop_ids]
    assert got.ids == want


def test_rows_of_a_padded_batch_equal_single_rows(model):
    items, tokens = prompts(model, 6)
    state = empty(model, 6)
    together = generate(state, read(state, tokens)[:, -1], stop=model.prompt.stop)
    for row, item in enumerate(items):
        asked = model.questions([model.prompt.question(item.question)])
        alone = empty(model)
        logits = read(alone, join(model.contexts([item.context]), asked))[:, -1]
        assert generate(alone, logits, stop=model.prompt.stop)[0] == together[row]


def test_what_was_streamed_is_the_answer(model):
    _, tokens = prompts(model, 4)
    said: dict[int, str] = {}
    state = empty(model, 4)
    answers = generate(
        state,
        read(state, tokens)[:, -1],
        stop=("\n",),
        on_text=lambda row, text: said.update({row: said.get(row, "") + text}),
    )
    assert [said[row] for row in range(4)] == [answer.text for answer in answers]


def test_sampling_follows_its_seed_and_its_limits(model):
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(4000, 1)

    def draw(sampling):
        return pick(logits, sampling, torch.Generator().manual_seed(sampling.seed))

    hot = Sampling(temperature=1.0)
    assert torch.equal(draw(hot), draw(hot))
    assert not torch.equal(draw(hot), draw(Sampling(temperature=1.0, seed=1)))
    shares = torch.bincount(draw(hot), minlength=4) / 4000
    assert (shares - logits[0].softmax(-1)).abs().max() < 0.03
    assert set(draw(Sampling(temperature=1.0, top_k=2)).tolist()) == {0, 1}
    assert set(draw(Sampling(temperature=1.0, top_p=0.6)).tolist()) == {0}
    assert set(draw(Sampling(temperature=1.0, top_p=0.7)).tolist()) == {0, 1}
    assert set(draw(GREEDY).tolist()) == {0}


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match="out of range"):
        Sampling(**wrong)


@given(pieces=st.lists(st.text("ab\n\ufffd", max_size=3), max_size=8))
@settings(max_examples=200)
def test_a_writer_never_takes_anything_back(pieces):
    said: list[str] = []
    writer, answer = _Writer(0, ("ab\n", "bb"), lambda _, text: said.append(text)), Answer()
    for text in accumulate(pieces):
        answer.text, stopped = writer.write(text)
        assert answer.text.startswith("".join(said))
        if stopped:
            assert not any(word in answer.text for word in ("ab\n", "bb"))
            break
    writer.finish(answer)
    assert "".join(said) == answer.text


def test_positions_bound_the_answer(model):
    """An answer ends where the model's positions do, instead of failing."""
    limit = model.geometry.max_positions
    state = empty(model)
    state.next_position += limit - 3
    _, tokens = prompts(model, 1)
    first = type(tokens)(tokens.ids[:, :1], tokens.mask[:, :1], tokens.spans)
    answer = generate(state, read(state, first)[:, -1], max_new_tokens=50)[0]
    assert len(answer.ids) <= 3
