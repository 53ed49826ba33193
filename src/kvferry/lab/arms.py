"""The arms: what the sender sends. The receiver treats every message alike; it never knows that one is a control.

An arm is one line of `ARMS`: a function from what the sender has read to one message per item.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kvferry.align.covered import covers
from kvferry.codec import CODECS
from kvferry.codec.ecsq import Ecsq
from kvferry.codec.profiles import NONE
from kvferry.errors import CodecNotCovered
from kvferry.kv import KV, Group
from kvferry.lab.items import Batch, swapped
from kvferry.session.message import Message, text_message
from kvferry.session.sender import Sender

Family = Literal["text", "cache", "control"]
World = Literal["own", "twin"]
"""The item's own text, or that of its twin."""

INT8, INT4, RAW = "int(bits=8)", "int(bits=4)", "raw(dtype=float16)"


@dataclass(frozen=True)
class Reading:
    """A batch as the sender has read it; `mean` is its average cache over other texts, `[layers, 1, heads, 1, dim]`."""

    batch: Batch
    kv: KV
    mean: tuple[Group, ...]


@dataclass(frozen=True)
class Arm:
    """`codec` codes the caches, None where text is sent; `world` is the one that the message tells of, if any."""

    name: str
    family: Family
    pack: Callable[[Sender, Reading], list[Message]]
    source: str
    codec: str | None
    world: World | None
    meaning: str

    def sender(self, model: Sender) -> Sender:
        """The sender as this arm needs it."""
        return model if self.codec is None else model.with_codec(self.codec)

    def recipe(self, sender: Sender) -> str:
        """What is sent, in one line: `source | codec` for caches."""
        return self.source if self.codec is None else f"{self.source} | {sender.codec!r}"


def no_text(sender: Sender, reading: Reading) -> list[Message]:
    return [text_message("") for _ in reading.batch.items]


def whole_text(sender: Sender, reading: Reading, *, compress: bool = False) -> list[Message]:
    return [text_message(text, compress=compress) for text in reading.batch.contexts]


def text_end(sender: Sender, reading: Reading, *, n_bytes: int) -> list[Message]:
    return [text_message(last_bytes(text, n_bytes)) for text in reading.batch.contexts]


def cache(sender: Sender, reading: Reading) -> list[Message]:
    return sender.encode(reading.kv)


def twin_cache(sender: Sender, reading: Reading) -> list[Message]:
    messages = sender.encode(reading.kv)
    return [messages[twin] for twin in swapped(len(messages))]


def zeroed_cache(sender: Sender, reading: Reading) -> list[Message]:
    groups = (
        replace(g, keys=torch.zeros_like(g.keys), values=torch.zeros_like(g.values))
        for g in reading.kv.groups
    )
    return sender.encode(reading.kv.with_groups(tuple(groups)))


def mean_cache(sender: Sender, reading: Reading) -> list[Message]:
    groups = (
        replace(g, keys=mean.keys.expand_as(g.keys), values=mean.values.expand_as(g.values))
        for g, mean in zip(reading.kv.groups, reading.mean, strict=True)
    )
    return sender.encode(reading.kv.with_groups(tuple(groups)))


def _text(name: str, pack: Callable[[Sender, Reading], list[Message]], source: str, meaning: str) -> Arm:
    return Arm(name, "text", pack, source, codec=None, world="own", meaning=meaning)


def _text_at(n_bytes: int) -> Arm:
    pack = partial(text_end, n_bytes=n_bytes)
    return _text(f"text_at_{n_bytes}", pack, f"text(last={n_bytes})", f"the last {n_bytes} bytes of the text")


def _cache(name: str, codec: str, meaning: str) -> Arm:
    return Arm(name, "cache", cache, "cache", codec, world="own", meaning=meaning)


ARMS: tuple[Arm, ...] = (
    Arm(
        "receiver_only",
        "control",
        no_text,
        "nothing",
        None,
        None,
        "no context at all: what can the receiver guess?",
    ),
    _text("text_full", whole_text, "text", "the receiver reads the whole text itself"),
    _text("text_zstd", partial(whole_text, compress=True), "text(zstd)", "the same text, compressed"),
    *(_text_at(n_bytes) for n_bytes in (16, 32, 64)),
    _cache("kv_raw", RAW, "the sender's cache in 16-bit floats"),
    _cache("kv_int8", INT8, "the sender's cache in 8-bit integers"),
    _cache("kv_int4", INT4, "the sender's cache in 4-bit integers"),
    Arm(
        "kv_zeroed", "control", zeroed_cache, "zeros", INT8, None, "zeros for numbers: does any message help?"
    ),
    Arm(
        "kv_mean",
        "control",
        mean_cache,
        "mean",
        INT8,
        None,
        "the mean cache of other texts: does any cache help?",
    ),
    Arm(
        "kv_twin",
        "control",
        twin_cache,
        "twin",
        INT8,
        "twin",
        "the twin's cache: do answers follow the message?",
    ),
)


def arms_for(coded_with: Sequence[str]) -> tuple[Arm, ...]:
    """`ARMS`, and one for each step of `ecsq` that an aligner was fitted under.

    Raises `CodecNotCovered` for an aligner that does not cover the codecs of `ARMS`.
    """
    for codec in (RAW, INT8, INT4):
        if not covers(coded_with, repr(CODECS.parse(codec))):
            cure = f"Fit one under {RAW}, {INT8} and {INT4}; this one covers {', '.join(coded_with)}"
            raise CodecNotCovered(f"the demo sends {codec}, the aligner was not fitted under it", cure=cure)
    fitted = (CODECS.parse(spec) for spec in coded_with)
    return (*ARMS, *(_entropy_coded(codec) for codec in fitted if isinstance(codec, Ecsq)))


def family_of(arm: str) -> Family | None:
    """The family of an arm by its name, None for the sender alone; what an aligner brings are caches."""
    if arm == "sender_alone":
        return None
    families: dict[str, Family] = {one.name: one.family for one in ARMS}
    return families.get(arm, "cache")


def _entropy_coded(codec: Ecsq) -> Arm:
    kind, how = ("ecsq", "on its own") if codec.profile == NONE else ("profile", "with a profile")
    words = f"the sender's cache, entropy coded {how}, step {codec.step}"
    return _cache(f"kv_{kind}_{codec.step}", repr(codec), words)


def last_bytes(text: str, n_bytes: int) -> str:
    """The end of a text, at most `n_bytes` of UTF-8, cut between characters.

    >>> last_bytes("aé", 1), last_bytes("aé", 2)
    ('', 'é')
    """
    return text.encode()[-n_bytes:].decode(errors="ignore")


def mean_groups(kv: KV) -> tuple[Group, ...]:
    """The mean over all present tokens of all sequences, for each layer, head and channel."""
    return tuple(
        replace(
            g,
            keys=_mean(g.keys, kv.present[list(g.layers)]),
            values=_mean(g.values, kv.present[list(g.layers)]),
        )
        for g in kv.groups
    )


def _mean(states: Tensor, present: Tensor) -> Tensor:
    weights = present[:, :, None, :, None].to(states.dtype)
    return (states * weights).sum((1, 3), keepdim=True) / weights.sum((1, 3), keepdim=True)
