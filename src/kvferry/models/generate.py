"""kvferry's decode loop: batched, masked by slot and layer, greedy or sampled, with stop strings and streaming."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvferry.errors import UsageError
from kvferry.kv import Role
from kvferry.models.load import Model
from kvferry.models.state import State, read
from kvferry.models.tokens import Tokens, plain_spans

OnText = Callable[[int, str], None]
"""Called with the row and the text that became certain."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature=0` is greedy; `top_k=0` and `top_p=1` keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(f"{self} is out of range", cure="temperature >= 0, top_k >= 0, 0 < top_p <= 1")


GREEDY = Sampling()


@dataclass
class Answer:
    """One generated continuation. `ended_by`: stop string, end-of-text token, or length.

    `margin`: the smallest difference, over its steps, of the two largest log-probabilities, in nats.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    ended_by: str = ""
    margin: float = field(default=inf, compare=False)


@torch.no_grad()
def generate(
    state: State,
    logits: Float[Tensor, "batch vocab"],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    on_text: OnText | None = None,
) -> list[Answer]:
    """Continue each row of `state` from the logits of its last token.

    A row ends before its stop string, at an end-of-text token, after `max_new_tokens`, or where the longest row has
    used the model's last position.
    """
    model, answers = state.model, [Answer() for _ in range(logits.shape[0])]
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    writers = [_Writer(row, stop, on_text) for row in range(len(answers))]
    n_steps = min(max_new_tokens, _room(state) + 1)  # the last token drawn need not be read
    for step in range(n_steps):
        ids = pick(logits, sampling, generator)
        margins = _margins(logits).tolist()
        for answer, writer, number, margin in zip(answers, writers, ids.tolist(), margins, strict=True):
            if not answer.ended_by:
                answer.margin = min(answer.margin, margin)
                _take(answer, writer, number, model)
        going = [not answer.ended_by for answer in answers]
        if not any(going) or step + 1 == n_steps:
            break
        logits = read(state, _column(ids, going))[:, -1]
    for answer, writer in zip(answers, writers, strict=True):
        writer.finish(answer)
    return answers


def pick(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    ordered, order = scores.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
    drawn = torch.multinomial(ordered.softmax(-1), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def _margins(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    first, second = logits.float().topk(2).values.unbind(-1)
    return first - second


def _room(state: State) -> int:
    """Positions that are left in the longest row."""
    limit = state.model.geometry.max_positions
    return sys.maxsize - 1 if limit is None else limit - int(state.next_position.max())


def _take(answer: Answer, writer: "_Writer", number: int, model: Model) -> None:
    if number in model.stop_ids:
        answer.ended_by = "end of text"
        return
    answer.ids.append(number)
    text = model.tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answer.text, stopped = writer.write(str(text))
    answer.ended_by = "stop string" if stopped else ""


def _column(ids: Int[Tensor, " batch"], going: list[bool]) -> Tokens:
    mask = torch.tensor(going, device=ids.device).unsqueeze(-1)
    return Tokens(ids.unsqueeze(-1), mask, tuple(plain_spans(1, Role.TEXT) for _ in going))


class _Writer:
    """Cuts one row's text at a stop string and hands out only what can no longer become part of one."""

    def __init__(self, row: int, stop: tuple[str, ...], on_text: OnText | None) -> None:
        self.row, self.stop, self.on_text, self.said = row, stop, on_text, 0

    def write(self, text: str) -> tuple[str, bool]:
        cuts = [found for word in self.stop if (found := text.find(word)) >= 0]
        if cuts:
            text = text[: min(cuts)]
            self._say(text, len(text))
            return text, True
        self._say(text, len(text) - self._held_back(text))
        return text, False

    def finish(self, answer: Answer) -> None:
        answer.ended_by = answer.ended_by or "length"
        self._say(answer.text, len(answer.text))

    def _held_back(self, text: str) -> int:
        """Characters at the end that may still change: an unfinished UTF-8 sequence, or the start of a stop string."""
        if text.endswith("\ufffd"):
            return len(text) - len(text.rstrip("\ufffd"))
        starts = [n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])]
        return max(starts, default=0)

    def _say(self, text: str, end: int) -> None:
        if self.on_text is not None and end > self.said:
            self.on_text(self.row, text[self.said : end])
        self.said = max(self.said, end)
