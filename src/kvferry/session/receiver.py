"""The side that answers: message and question in, reply out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.contract import Aligner, Contract
from kvferry.align.folder import aligner_folder, load_aligner
from kvferry.align.identity import Identity
from kvferry.codec import codec_of, decode
from kvferry.codec.manifest import agreement_of
from kvferry.codec.profiles import hold_profiles, profiles_of
from kvferry.errors import ContractError, ForeignModel, GridMismatch, Malformed, UsageError
from kvferry.fuse.fill import Fill, with_zeros
from kvferry.kv import KV, stack
from kvferry.models.generate import OnText
from kvferry.models.load import Model, load
from kvferry.models.relay import take_over
from kvferry.models.state import State
from kvferry.session.message import Message, message_of
from kvferry.session.reading import answer_texts, finish, question_tokens
from kvferry.session.reply import Reply, Stopwatch
from kvferry.wire import Agreement, Frame, MessageKind, json_frame, read_json


class Receiver:
    """A model that answers from messages, through the aligner of its sender.

    Without an aligner it takes messages of its own model only. Every message is checked against the contract: model,
    tokenizer, grid and codec; anything else is refused, and the receiver goes on. `fill` says what stands where nothing
    came: `zeros` are there to be compared with.
    """

    def __init__(
        self,
        model: Model | str | Path,
        aligner: Aligner | str | Path | None = None,
        fill: Fill = "absent",
    ) -> None:
        self.model = model if isinstance(model, Model) else load(str(model))
        self.aligner = self._aligner(aligner).to(self.model.device)
        self.contract, self.fill = self.aligner.contract, fill
        own, wanted = self.model.geometry, self.contract.receiver
        if (own.model, own.tokenizer) != (wanted.model, wanted.tokenizer):
            cure = "Load the receiver that the aligner's card names, or fit one for this model"
            raise ForeignModel(
                f"the aligner was fitted for another receiver than {self.model.name}", cure=cure
            )

    def answer(
        self, message: Message, question: str, *, max_new_tokens: int = 32, on_text: OnText | None = None
    ) -> Reply:
        """Answer a question about what the sender read. A text message is read as text.

        Raises `WireError` for damaged bytes, `ContractError` for a message this aligner must not see,
        `ContextTooLong` where slots and question exceed the model's positions.
        """
        return self.answer_batch([message], [question], max_new_tokens=max_new_tokens, on_text=on_text)[0]

    def answer_batch(
        self,
        messages: Sequence[Message],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 32,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """`answer` for several messages at once, all text or all caches; the same replies as one by one."""
        _check_batch(messages, questions)
        if messages[0].is_text:
            texts = [message.text for message in messages]
            return answer_texts(self.model, texts, questions, max_new_tokens=max_new_tokens, on_text=on_text)
        state, logits, watch = self.take_in([message.frame for message in messages], questions)
        return finish(state, logits, watch, max_new_tokens=max_new_tokens, on_text=on_text)

    def take_in(
        self, frames: Sequence[Frame], questions: Sequence[str]
    ) -> tuple[State, Float[Tensor, "batch vocab"], Stopwatch]:
        """Read questions behind caches, whole or cut: the state, the logits of the first token of each answer."""
        watch = Stopwatch(self.model.device)
        with watch.stage("decode"):
            caches = stack([self._decode(frame) for frame in frames])
        with watch.stage("align"), torch.no_grad():
            aligned = self.aligner(caches)
        with watch.stage("prefill"):
            state, logits = self._prefill(aligned, questions)
        return state, logits, watch

    def welcome(self, hello: Message) -> Message:
        """Accept a sender's hello or raise the `ContractError` that says why not."""
        content = _read_hello(hello.frame)
        self.contract.require_sender(content["model"], content["tokenizer"])
        _require_grid(content["grid"], self.contract)
        _require_tokens(content, self.model.geometry.tokenizer)
        self.aligner.require_codec(content["codec"])
        content = {
            "codecs": list(self.contract.coded_with),
            "contracts": [agreed.contract_id for agreed in self.agreements],
            "refines": True,
        }
        return message_of(json_frame(MessageKind.HELLO, content))

    @property
    def onto(self) -> Model | None:
        """What a sender for this receiver takes as `onto`: its model, where the aligner reads that one's tokens."""
        return self.model if self.contract.grid == "receiver" else None

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        """What short headers may stand for: no model (text, requests), and the aligner's sender under each profile."""
        sender = self.contract.sender
        return (
            Agreement(),
            *(agreement_of(sender, profile) for profile in profiles_of(self.contract.coded_with)),
        )

    def _aligner(self, given: Aligner | str | Path | None) -> Aligner:
        if isinstance(given, Aligner):
            return given
        if given is not None:
            folder = aligner_folder(given)
            hold_profiles(folder)
            return load_aligner(folder)
        own = self.model.geometry
        return Identity(Contract(sender=own, receiver=own))

    def _decode(self, frame: Frame) -> KV:
        if frame.kind != MessageKind.KV:
            raise ContractError(
                f"a {frame.kind.name} message, a cache or text is needed", cure="Send what Sender.read made"
            )
        self.contract.require_sender(f"{frame.model_hash:016x}", f"{frame.tokenizer_hash:016x}")
        _require_grid(frame.grid.name.lower(), self.contract)
        self.aligner.require_codec(repr(codec_of(frame)))
        kv = decode(frame, self.contract.sender, device=self.model.device)
        kv.require_space("content")
        return with_zeros(kv) if self.fill == "zeros" else kv

    @torch.no_grad()
    def _prefill(self, kv: KV, questions: Sequence[str]) -> tuple[State, torch.Tensor]:
        asked = question_tokens(self.model, kv.spans, questions)
        state, logits = take_over(self.model, kv, self.contract.stride, asked)
        return state, logits[:, -1]


def _check_batch(messages: Sequence[Message], questions: Sequence[str]) -> None:
    if not all(question.strip() for question in questions):
        raise UsageError("a question is empty", cure="Ask something about the context")
    if not messages or len(messages) != len(questions):
        raise UsageError(
            f"{len(messages)} messages and {len(questions)} questions",
            cure="Give one question to each message",
        )
    if len({message.is_text for message in messages}) > 1:
        raise UsageError("text and cache messages in one batch", cure="Answer them in two calls")


def _read_hello(frame: Frame) -> dict[str, Any]:
    if frame.kind != MessageKind.HELLO:
        raise ContractError(f"the first message is {frame.kind.name}", cure="Begin with HELLO")
    content = read_json(frame)
    missing = {"model", "tokenizer", "grid", "codec"} - {
        key for key in content if isinstance(content[key], str)
    }
    if missing:
        raise Malformed(f"HELLO without {', '.join(sorted(missing))}", cure="Send what Sender.hello() makes")
    return content


def _require_tokens(hello: dict[str, Any], own: str) -> None:
    """On the receiver's grid the tokens must be the receiver's own; a message alone does not say whose they are."""
    if hello["grid"] != "receiver":
        return
    onto = hello.get("onto")
    if not isinstance(onto, str):
        cure = "Say onto which tokenizer, as Sender.hello() does"
        raise Malformed("HELLO on the receiver's grid without onto", cure=cure)
    if onto != own:
        what = f"the sender pools onto the tokens of {onto[:16]}, this receiver's are {own[:16]}"
        raise GridMismatch(what, cure="Give the sender this receiver's tokenizer: Sender(onto=...), --onto")


def _require_grid(grid: str, contract: Contract) -> None:
    if grid != contract.grid:
        cure = "Send on the aligner's grid (Sender(onto=...), --onto for the receiver's) or fit one for yours"
        raise GridMismatch(
            f"tokens come on the {grid} grid, the aligner reads the {contract.grid} grid", cure=cure
        )
