"""What mutation starts from: a small frame for every codec and option, and for everything else that travels."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

import contract
from kvferry.codec import CODECS
from kvferry.codec.manifest import spans_segment
from kvferry.kv import KV, Geometry, Plan, Spans
from kvferry.session.message import text_message
from kvferry.wire import Agreement, Frame, MessageKind, cut, json_frame, pack, text_frame
from profiles import held_profile
from specs import SPECS

KEY = bytes(range(32))
NOBODY = contract.geometry(((1, 1, 1),), model="00")
"""The sender of frames that come from no model."""


@dataclass(frozen=True)
class Seed:
    """Honest bytes, and what their reader knows. `datagrams`: pieces of one message instead of a frame."""

    name: str
    data: bytes
    geometry: Geometry | None = None
    key: bytes | None = None
    agreements: tuple[Agreement, ...] = ()
    datagrams: tuple[bytes, ...] = ()


@cache
def seeds() -> tuple[Seed, ...]:
    kv = _cache()
    return (*(_coded(spec, kv) for spec in SPECS), *_forms(kv), *_texts(), *_datagrams(kv))


def _cache() -> KV:
    roles = np.array([1, 2, 2, 0, 0, 0, 0, 3, 0], np.uint8)
    return contract.cache(contract.RAGGED, n_tokens=9, spans=(contract.spans(9, roles),))


def _coded(spec: str, kv: KV) -> Seed:
    plan = Plan.everything(kv)
    plan.classes[1, :, 2:4] = 0
    plan.classes[3, :, 5:] = 0
    return Seed(spec, pack(CODECS.parse(spec).encode(kv, plan)), kv.geometry)


def _forms(kv: KV) -> list[Seed]:
    """Other headers, seals and segments around one codec."""
    codec = CODECS.parse("int(4)")
    frame = codec.encode(kv)
    short = replace(frame, short=True)
    starts = np.arange(9, dtype=np.int32) * 4
    spans = spans_segment(Spans(starts * 0, starts, starts + 4, kv.spans[0].role))
    axes = replace(kv, positions=kv.positions.repeat(3, 1, 1) * 2, space="rotated", call_length=77)
    return [
        Seed("short", pack(short), kv.geometry, agreements=(frame.agreement,)),
        Seed("sealed", pack(frame, KEY), kv.geometry, KEY),
        Seed("short sealed", pack(short, KEY), kv.geometry, KEY, (frame.agreement,)),
        Seed("spans", pack(replace(frame, segments=(*frame.segments, spans))), kv.geometry),
        Seed("axes", pack(codec.encode(axes)), kv.geometry),
        Seed("receiver's grid", pack(codec.encode(_on_the_receivers_grid(kv))), kv.geometry),
        Seed("no tokens", pack(codec.encode(contract.cache(contract.RAGGED, n_tokens=0))), kv.geometry),
        Seed("classes", pack(_classes(kv)), kv.geometry),
        Seed("profile", pack(_profiled(kv)), kv.geometry),
        Seed("layers", pack(_profiled(kv, "progressive")), kv.geometry),
        Seed("sparse", pack(_sparse(CODECS.parse("int(4)"))), contract.geometry(((1, 1, 1), (1, 1, 1)))),
    ]


def _on_the_receivers_grid(kv: KV) -> KV:
    return replace(kv, spans=tuple(replace(row, overlap=row.role * 2) for row in kv.spans))


def _classes(kv: KV) -> Frame:
    """Tokens of three precisions, keys and values apart."""
    plan = Plan.everything(kv)
    plan.classes[:, :, :4] = 2
    plan.classes[2, 1, 6:] = 5
    return CODECS.parse("ecsq").encode(kv, plan)


def _profiled(kv: KV, codec: str = "ecsq") -> Frame:
    """Channels as a profile says that both ends hold."""
    return CODECS.parse(f"{codec}(profile={held_profile(kv.geometry).name})").encode(kv)


def _sparse(codec) -> Frame:
    """Tokens as Rice codes: few of many, in one layer of two."""
    kv = contract.cache(((1, 1, 1), (1, 1, 1)), n_tokens=64)
    plan = Plan.everything(kv)
    plan.classes[0, :, ::9] = 0
    plan.classes[1, :, 1:] = 0
    plan.classes[1, :, ::13] = 1
    return codec.encode(kv, plan)


def _texts() -> list[Seed]:
    hello = {
        "model": "ab" * 32,
        "tokenizer": "cd" * 32,
        "grid": "sender",
        "codec": "raw",
        "n": [1, 2.5, None],
    }
    frames = [
        json_frame(kind, hello) for kind in MessageKind if kind not in (MessageKind.KV, MessageKind.TEXT)
    ]
    return [
        Seed("text", pack(text_frame("Grüße aus Oslo"))),
        Seed("packed text", text_message(40 * "Ann has tea in Oslo. ", compress=True).data),
        *(Seed(frame.kind.name.lower(), pack(frame)) for frame in frames),
    ]


def _datagrams(kv: KV) -> list[Seed]:
    message = pack(CODECS.parse("int(4)").encode(kv))
    return [Seed("datagrams", message, datagrams=tuple(cut(message, 120, message_id=7)))]
