"""A prompt that sender and receiver have both read, and how well the receiver answers with what a fuser adds.

The receiver reads all of the prompt but its last token, on which it begins to answer. The sender's cache is pooled to
the receiver's tokens. `hears` says how much the sender has read: where that is the whole prompt, it may have answered
the question already, and then its cache carries an answer; of the context alone it can only carry understanding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from kvferry.align.receiver_grid import on_receiver_grid
from kvferry.codec import Codec, roundtrip
from kvferry.errors import UsageError
from kvferry.fuse.contract import Fuser
from kvferry.kv import KV
from kvferry.models.capture import capture
from kvferry.models.enrich import Prompted, all_but_last, go_on, read_prompt
from kvferry.models.load import Model
from kvferry.models.tokens import Tokens, encode, join
from kvferry.train.loop import Loss
from kvferry.train.sources.example import Example

Hears = Literal["prompt", "context"]
"""How much of the prompt the sender has read."""


@dataclass(frozen=True)
class Both:
    """Two models and how much the sender hears of what the receiver reads."""

    sender: Model
    receiver: Model
    hears: Hears = "prompt"

    def read(self, examples: Sequence[Example], codec: Codec | None = None) -> "BothRead":
        """Let both read; what follows the first scored piece of an example is left out.

        With a codec the sender's cache arrives coded and decoded.
        """
        prompts, answers = zip(*map(prompt_and_answer, examples), strict=True)
        prompt, last = all_but_last(self.receiver.contexts(list(prompts)))
        answer = encode(self.receiver.tokenizer, answers)
        after = join(last, answer)
        heard = list(prompts) if self.hears == "prompt" else [example.context for example in examples]
        arrived = on_receiver_grid(capture(self.sender, heard).kv, prompt.spans)
        arrived = arrived if codec is None else roundtrip(codec, arrived)
        scored = torch.arange(after.ids.shape[1]) >= after.ids.shape[1] - answer.lengths.unsqueeze(-1)
        return BothRead(read_prompt(self.receiver, prompt, after), arrived, last, after, scored)


@dataclass(frozen=True)
class BothRead:
    """A batch that was read. `last` is the prompt's last token; `after` goes on to the answer, which is `scored`."""

    prompted: Prompted
    arrived: KV
    last: Tokens
    after: Tokens
    scored: Bool[Tensor, "batch tokens"]


def prompt_and_answer(example: Example) -> tuple[str, str]:
    """All up to the first scored piece, and that piece. Raises `UsageError` where nothing is scored."""
    prompt = example.context
    for text, scored in example.pieces:
        if scored:
            return prompt, text
        prompt += text
    raise UsageError("an example without an answer", cure="Score at least one piece of each example")


def answer_loss(fuser: Fuser, batch: BothRead) -> Loss:
    """Cross-entropy of the answers' tokens. Differentiable in the fuser."""
    _, logits = go_on(batch.prompted, batch.after, [(fuser, batch.arrived)], keep=0)
    predicted, ids = _at_scored(logits, batch)
    return Loss(functional.cross_entropy(predicted, ids, reduction="sum"), float(len(ids)))


def _at_scored(
    logits: Float[Tensor, "batch tokens vocab"], batch: BothRead
) -> tuple[Float[Tensor, "scored vocab"], Int[Tensor, " scored"]]:
    scored = batch.scored[:, 1:].to(logits.device)
    return logits[:, :-1][scored].float(), batch.after.ids.to(logits.device)[:, 1:][scored]
