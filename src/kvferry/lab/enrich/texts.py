"""What text can do: the sender answers, and the receiver is told in a sentence."""

from collections.abc import Callable, Sequence

from kvferry.lab.items import right
from kvferry.lab.run import MAX_NEW_TOKENS
from kvferry.models.load import Model
from kvferry.models.zoo.worlds import Item, make_item
from kvferry.session.reading import answer_texts

Told = Callable[[str, str], str]
"""Context and sentence -> what the receiver reads before the question."""

PLACES: dict[str, Told] = {
    "after the context": lambda context, sentence: f"{context} {sentence}",
    "before the context": lambda context, sentence: f"{sentence} {context}",
}
N_DEV = 64


def stated(question: str, answer: str) -> str:
    """An answer as a sentence of the worlds.

    >>> stated("Where is Ann?", "Oslo")
    'Ann is in Oslo.'
    """
    return f"{question.removeprefix('Where is ').removesuffix('?')} is in {answer or 'it'}."


def sentence_alone(context: str, sentence: str) -> str:
    """The receiver reads no context: it can only pass the sender's answer on."""
    return sentence


def answered(model: Model, texts: Sequence[str], questions: Sequence[str]) -> list[str]:
    """Each question asked behind its text."""
    return [reply.text for reply in answer_texts(model, texts, questions, max_new_tokens=MAX_NEW_TOKENS)]


def told(sender: Model, receiver: Model, items: Sequence[Item], how: Told) -> list[str]:
    """The receiver's answers, the sender having read everything and answered first."""
    questions = [item.question for item in items]
    said = answered(sender, [item.context for item in items], questions)
    sentences = map(stated, questions, (text.strip() for text in said))
    texts = [how(item.context, sentence) for item, sentence in zip(items, sentences, strict=True)]
    return answered(receiver, texts, questions)


def best_place(sender: Model, receiver: Model, kind: str, n_facts: int) -> str:
    """Where the receiver makes most of the sentence, on items of dev."""
    items = [make_item(number, kind=kind, n_facts=n_facts, split="dev") for number in range(N_DEV)]
    answers = [item.answer for item in items]
    scores = {name: right(told(sender, receiver, items, how), answers).mean() for name, how in PLACES.items()}
    return max(scores, key=lambda name: scores[name])
