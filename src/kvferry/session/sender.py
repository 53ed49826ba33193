"""The side that reads: text in, message out."""

from collections.abc import Sequence
from pathlib import Path

from kvferry.align.receiver_grid import on_receiver_grid
from kvferry.codec import CODECS, Codec
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV, Readout
from kvferry.models.capture import capture
from kvferry.models.load import Model, load
from kvferry.models.tokenizer import Tokenizer, tokenizer_of
from kvferry.select import SELECTORS
from kvferry.select.contract import Selector
from kvferry.select.sight import Sight
from kvferry.session.message import Message, message_of
from kvferry.session.reading import answer_texts
from kvferry.session.reply import Reply
from kvferry.session.selecting import encode_sight, look, require_pairing
from kvferry.wire import MessageKind, json_frame


class Sender:
    """A model that reads contexts and a codec that turns what it read into messages.

    `onto` (a model, or a name or folder to read its tokenizer from) puts caches on that receiver's tokens, for aligners
    whose contract says `grid="receiver"`; else each message holds the sender's own.

    `select` decides which tokens, layers and precisions are sent; `all` leaves a cap to the codec. `readout` is the
    aligner, for selectors that look through it. Raises `UsageError` for a selector that the codec has no classes for,
    `FolderError` and `ForeignModel` for one whose folder is missing or of another model.

    >>> sender = Sender("llama", codec="int(bits=4)")
    >>> message = sender.read("Ann has tea in Oslo.")
    >>> message.frame.n_tokens > 0
    True
    """

    def __init__(
        self,
        model: Model | str | Path,
        codec: Codec | str = "ecsq",
        onto: Model | Tokenizer | str | Path | None = None,
        select: Selector | str = "all",
        readout: Readout | None = None,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(str(model))
        self.codec = CODECS.parse(codec) if isinstance(codec, str) else codec
        self.onto = onto if onto is None or isinstance(onto, Tokenizer) else tokenizer_of(onto)
        self.select = SELECTORS.parse(select) if isinstance(select, str) else select
        self.readout = readout
        require_pairing(self.codec, self.select)
        self.select.require_sender(self.model.geometry)

    def with_codec(self, codec: Codec | str) -> "Sender":
        """The same model on the same grid, selecting alike, with another codec."""
        return Sender(self.model, codec, self.onto, self.select, self.readout)

    def read(self, text: str, max_bytes: int | None = None, *, question: str | None = None) -> Message:
        """Read a context and pack it into at most `max_bytes`.

        `question` is what the receiver asked first, for selectors that look at it. Raises `EmptyContext`,
        `ContextTooLong`, `NotFinite`, `BudgetTooSmall`, `UsageError` for a selector that misses its question.
        """
        (sight,) = self.look([text], None if question is None else [question])
        return encode_sight(self.codec, self.select, sight, max_bytes)

    def read_batch(self, texts: Sequence[str], max_bytes: int | None = None) -> list[Message]:
        """`read` for several contexts in one prefill."""
        return [encode_sight(self.codec, self.select, sight, max_bytes) for sight in self.look(texts)]

    def look(self, texts: Sequence[str], questions: Sequence[str] | None = None) -> list[Sight]:
        """Read contexts: what may be sent of each, and what the selector needs to know."""
        asked = questions if self.select.reads_question else None
        return look(
            self.model, texts, self.select.needs, onto=self.onto, questions=asked, readout=self.readout
        )

    def capture(self, texts: Sequence[str]) -> KV:
        """The text slots of several contexts, in content space, one left-padded batch."""
        own = text_slots(capture(self.model, texts).kv)
        return own if self.onto is None else on_receiver_grid(own, self.onto.spans(texts))

    def encode(self, kv: KV, max_bytes: int | None = None) -> list[Message]:
        """One message for each sequence of a cache, all of it: nothing is selected."""
        return [message_of(self.codec.encode(one, max_bytes=max_bytes)) for one in kv.sequences()]

    def hello(self) -> Message:
        """The first message of every exchange: who sends, on which grid, in which codec."""
        geometry = self.model.geometry
        content = {
            "model": geometry.model,
            "tokenizer": geometry.tokenizer,
            "grid": "sender" if self.onto is None else "receiver",
            "codec": repr(self.codec.agreed()),
        }
        if self.onto is not None:
            content["onto"] = self.onto.fingerprint
        return message_of(json_frame(MessageKind.HELLO, content))

    def answer(self, text: str, question: str, *, max_new_tokens: int = 32) -> Reply:
        """The sender's own answer, having read the text itself."""
        return self.answer_batch([text], [question], max_new_tokens=max_new_tokens)[0]

    def answer_batch(
        self, texts: Sequence[str], questions: Sequence[str], *, max_new_tokens: int = 32
    ) -> list[Reply]:
        """`answer` for several items at once."""
        return answer_texts(self.model, texts, questions, max_new_tokens=max_new_tokens)
