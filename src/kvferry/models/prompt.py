"""What stands around context and question: a model's chat template, or the plain question-and-answer form."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from kvferry.errors import UsageError

_CONTEXT, _QUESTION = "\ufffckvferry-context\ufffc", "\ufffckvferry-question\ufffc"


@dataclass(frozen=True)
class Prompt:
    """`head` + context + `before` + question + `after`; the answer follows and ends at a `stop` string."""

    head: str
    before: str
    after: str
    stop: tuple[str, ...]

    def question(self, text: str) -> str:
        """Everything after the context."""
        return f"{self.before}{text}{self.after}"


PLAIN = Prompt(head="", before="\nQ: ", after="\nA:", stop=("\n",))


def prompt_of(tokenizer: PreTrainedTokenizerFast) -> Prompt:
    """The prompt form of a model: from its chat template where it has one, else `PLAIN` after its BOS token."""
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        return Prompt(str(bos), PLAIN.before, PLAIN.after, PLAIN.stop)
    turns = [{"role": "user", "content": f"{_CONTEXT}\n\n{_QUESTION}"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not isinstance(text, str) or text.count(_CONTEXT) != 1 or text.count(_QUESTION) != 1:
        cure = "Pass a Prompt of your own to load()"
        raise UsageError("the chat template does not keep the user's text as it is", cure=cure)
    head, rest = text.split(_CONTEXT)
    before, after = rest.split(_QUESTION)
    return Prompt(head, before, after, stop=())


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
