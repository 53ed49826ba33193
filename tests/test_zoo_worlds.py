"""The worlds of the zoo: reproducible, honest, and never shared between splits."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import UnknownName, UsageError
from kvferry.models.zoo.kinds import KINDS
from kvferry.models.zoo.worlds import continuation, make_document, make_item, make_twins, prompt

seeds = st.integers(0, 10**9)
kinds = st.sampled_from(sorted(KINDS))
splits = st.sampled_from(["train", "dev", "test"])
sizes = st.integers(1, 16).map(lambda n: 2 * n)
fillers = st.integers(0, 12)


def read(context: str, question: str) -> set[str]:
    """Every answer that the sentences of a context support, found by pattern instead of by table."""
    places = re.findall(r"(\w+) has (\w+) in (\w+)\.", context)
    pairs = re.findall(r"(?:^|\. )([a-z]+) in (\w+)\.", context.replace(". ", ". . "))
    met = re.findall(r"(\w+) met (\w+)\.", context)
    counts = re.findall(r"(\w+) has (\w+) (\w+)\.", context)
    company = re.findall(r"(\w+) is with (\w+)\.", context)
    where = re.findall(r"(\w+) is in (\w+)\.", context)
    facts = {f"Where is the {good}?": town for _, good, town in places}
    facts |= {f"{good}?": town for good, town in pairs}
    facts |= {f"Who has the {good}?": name for name, good, _ in places}
    facts |= {f"Who has the {good}?": name for name, good in re.findall(r"(\w+) has (\w+)\.", context)}
    facts |= {f"Who was met by {one}?": two for one, two in met} | {
        f"Who met {two}?": one for one, two in met
    }
    facts |= {f"How many {thing} does {name} have?": number for name, number, thing in counts}
    facts |= {f"Where is {one}?": town for one, two in company for host, town in where if host == two}
    facts |= {f"Where is {host}?": town for host, town in where} | {
        f"With whom is {a}?": b for a, b in company
    }
    return {answer for asked, answer in facts.items() if asked == question}


@given(seeds, kinds, sizes, fillers, splits)
def test_the_context_gives_the_answer_and_nothing_else_does(seed, kind, n_facts, n_fillers, split):
    item = make_item(seed, kind=kind, n_facts=n_facts, n_fillers=n_fillers, split=split)
    assert read(item.context, item.question) == {item.answer}
    assert item.answer in item.choices
    assert item.answer not in item.question
    assert item.context.count(".") == item.n_facts + n_fillers
    assert item.n_facts == (1 if kind == "needle" else n_facts)


@given(seeds, kinds, sizes, fillers, splits)
def test_equal_arguments_give_equal_worlds(seed, kind, n_facts, n_fillers, split):
    size = {"kind": kind, "n_facts": n_facts, "n_fillers": n_fillers, "split": split}
    for make in (make_item, make_twins, make_document):
        assert make(seed, **size) == make(seed, **size)


def test_worlds_are_the_same_on_every_machine():
    item = make_item(7, n_facts=2)
    assert item.prompt == "Kate has tea in Riga. Vic has beer in Riga.\nQ: Who has the beer?\nA:"
    assert item.answer == "Vic"


@given(seeds, kinds, sizes, fillers, splits)
def test_twins_share_the_question_and_differ_in_the_answer(seed, kind, n_facts, n_fillers, split):
    one, two = make_twins(seed, kind=kind, n_facts=n_facts, n_fillers=n_fillers, split=split)
    assert one.question == two.question
    assert one.answer != two.answer
    assert read(one.context, one.question) == {one.answer}
    assert read(two.context, two.question) == {two.answer}
    if n_facts > 2 and kind != "needle":
        assert sorted(re.findall(r"\w+", one.context)) == sorted(re.findall(r"\w+", two.context))


@given(seeds, kinds, sizes, fillers)
def test_documents_ask_different_questions_with_true_answers(seed, kind, n_facts, n_fillers):
    document = make_document(seed, kind=kind, n_facts=n_facts, n_fillers=n_fillers)
    assert len(set(document.questions)) == len(document.questions) > 0
    for question, answer in zip(document.questions, document.answers, strict=True):
        assert read(document.context, question) == {answer}
    assert document.text.startswith(
        prompt(document.context, document.questions[0]) + continuation(document.answers[0])
    )


def test_no_context_is_in_two_splits():
    contexts = {
        split: {make_item(seed, kind="needle", split=split).context for seed in range(1000)}
        for split in ("train", "dev", "test")
    }
    assert not contexts["train"] & contexts["dev"]
    assert not contexts["train"] & contexts["test"]
    assert not contexts["dev"] & contexts["test"]


def test_answers_are_spread_evenly_over_their_choices():
    asked = [item for item in map(make_item, range(1200)) if item.question.startswith("Where")]
    counts = Counter(item.answer for item in asked)
    assert set(counts) == set(asked[0].choices)
    assert max(counts.values()) < 3 * min(counts.values())


def test_32_facts_are_short_enough_for_a_model_that_reads_bytes():
    assert max(len(make_item(seed, n_facts=32).prompt) for seed in range(200)) <= 768


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "plaice"}, UnknownName, "Did you mean 'place'"),
        ({"n_facts": 0}, UsageError, "cannot hold 0 facts. Choose 1 to 32"),
        ({"n_facts": 33}, UsageError, "cannot hold 33 facts"),
        ({"kind": "two_hop", "n_facts": 3}, UsageError, "a multiple of 2"),
        ({"n_fillers": -1}, UsageError, "n_fillers is -1"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_item(0, **arguments)


def test_worlds_need_no_torch():
    code = "import sys, kvferry.models.zoo.worlds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
