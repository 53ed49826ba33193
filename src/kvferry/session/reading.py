"""The last steps that sender and receiver share: read the question, continue, trim the answer."""

from collections.abc import Sequence

import torch

from kvferry.models.generate import OnText, generate
from kvferry.models.load import Model
from kvferry.models.state import State, empty, read
from kvferry.models.tokens import Tokens, join
from kvferry.session.reply import Reply, Stopwatch


@torch.no_grad()
def answer_texts(
    model: Model,
    contexts: Sequence[str],
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    on_text: OnText | None = None,
) -> list[Reply]:
    """The plain way: the model reads each context itself. An empty context is no context at all."""
    watch = Stopwatch(model.device)
    with watch.stage("prefill"):
        parts = [model.contexts(list(contexts)), question_tokens(model, contexts, questions)]
        state = empty(model, len(contexts))
        logits = read(state, join(*parts))[:, -1]
    return finish(state, logits, watch, max_new_tokens=max_new_tokens, on_text=on_text)


def question_tokens(model: Model, contexts: Sequence[object], questions: Sequence[str]) -> Tokens:
    """The questions with what stands around them; without a context, no separator from it."""
    asked = [model.prompt.question(question) for question in questions]
    return model.questions(
        [text if context else text.lstrip("\n") for context, text in zip(contexts, asked, strict=True)]
    )


def finish(
    state: State, logits: torch.Tensor, watch: Stopwatch, *, max_new_tokens: int, on_text: OnText | None
) -> list[Reply]:
    """Continue from the logits after the question."""
    with watch.stage("generate"):
        answers = generate(
            state, logits, max_new_tokens=max_new_tokens, stop=state.model.prompt.stop, on_text=on_text
        )
    stages = watch.shared_by(len(answers))
    return [Reply(answer.text.strip(), answer.ended_by, stages) for answer in answers]
