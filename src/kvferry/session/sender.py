"""The side that reads: text in, message out."""

from collections.abc import Sequence
from pathlib import Path

from kvferry.align.receiver_grid import on_receiver_grid
from kvferry.codec import CODECS, Codec
from kvferry.fuse.layout import text_slots
from kvferry.kv import KV
from kvferry.models.capture import capture
from kvferry.models.load import Model, load
from kvferry.models.tokenizer import Tokenizer, tokenizer_of
from kvferry.session.message import Message, message_of
from kvferry.session.reading import answer_texts
from kvferry.session.reply import Reply
from kvferry.wire import MessageKind, json_frame


class Sender:
    """A model that reads contexts and a codec that turns what it read into messages.

    `onto` (a model, or a name or folder to read its tokenizer from) puts caches on that receiver's tokens, for aligners
    whose contract says `grid="receiver"`; else each message holds the sender's own.

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
    ) -> None:
        self.model = model if isinstance(model, Model) else load(str(model))
        self.codec = CODECS.parse(codec) if isinstance(codec, str) else codec
        self.onto = onto if onto is None or isinstance(onto, Tokenizer) else tokenizer_of(onto)

    def with_codec(self, codec: Codec | str) -> "Sender":
        """The same model on the same grid with another codec."""
        return Sender(self.model, codec, self.onto)

    def read(self, text: str, max_bytes: int | None = None) -> Message:
        """Read a context and pack it into at most `max_bytes`.

        Raises `EmptyContext`, `ContextTooLong`, `NotFinite`, `BudgetTooSmall`.
        """
        return self.encode(self.capture([text]), max_bytes)[0]

    def read_batch(self, texts: Sequence[str]) -> list[Message]:
        """`read` for several contexts in one prefill."""
        return self.encode(self.capture(texts))

    def capture(self, texts: Sequence[str]) -> KV:
        """The text slots of several contexts, in content space, one left-padded batch."""
        own = text_slots(capture(self.model, texts).kv)
        return own if self.onto is None else on_receiver_grid(own, self.onto.spans(texts))

    def encode(self, kv: KV, max_bytes: int | None = None) -> list[Message]:
        """One message for each sequence of a cache."""
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
