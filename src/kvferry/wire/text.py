"""Frames whose body is text or JSON: the text baselines, hello, requests, reports, errors.

JSON bodies are strict: UTF-8, one object, sorted keys, no spaces, no duplicate keys, no NaN or infinity, floats as
their shortest decimal that reads back equal. So equal content is equal bytes here too.
"""

import json
from collections.abc import Mapping
from typing import Any

from kvferry.errors import LimitExceeded, Malformed, UsageError
from kvferry.wire.fields import MessageKind
from kvferry.wire.frame import Frame
from kvferry.wire.limits import DEFAULT_LIMITS, Limits
from kvferry.wire.segments import Segment, SegmentType


def text_frame(text: str) -> Frame:
    """A frame that carries text as UTF-8; `UsageError` if the text holds lone surrogates.

    >>> read_text(text_frame("Grüße"))
    'Grüße'
    """
    try:
        return Frame(MessageKind.TEXT, segments=(Segment(SegmentType.TEXT, text.encode()),))
    except UnicodeEncodeError as error:
        what = f"the text holds a lone surrogate at character {error.start}"
        raise UsageError(what, cure="Decode the text as UTF-8 first") from None


def read_text(frame: Frame) -> str:
    """The text of a frame; `Malformed` if it has none or it is no UTF-8."""
    return _utf8(_only(frame, SegmentType.TEXT))


def json_frame(kind: MessageKind, content: Mapping[str, Any]) -> Frame:
    """A frame that carries one JSON object; `UsageError` for what JSON cannot say.

    >>> read_json(json_frame(MessageKind.HELLO, {"grid": "sender"}))
    {'grid': 'sender'}
    """
    try:
        body = _canonical(dict(content))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"not a JSON object: {error}", cure="Use strings, finite numbers, lists and objects"
        ) from None
    return Frame(kind, segments=(Segment(SegmentType.JSON, body),))


def read_json(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The JSON object of a frame; `Malformed` unless it is strict and canonical."""
    body = _only(frame, SegmentType.JSON)
    if len(body) > limits.max_json:
        cure = "Send less or raise Limits.max_json"
        raise LimitExceeded(f"{len(body)} bytes of JSON, the limit is {limits.max_json}", cure=cure)
    try:
        content = json.loads(_utf8(body))
        canonical = isinstance(content, dict) and _canonical(content) == body
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the JSON body cannot be read: {error}", cure="Send strict JSON") from None
    if not canonical:
        raise Malformed(
            "the JSON body is no object or not canonical", cure="Sort keys, drop spaces and duplicates"
        )
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _only(frame: Frame, kind: SegmentType) -> bytes:
    body = frame.body(kind)
    if body is None:
        raise Malformed(
            f"a {frame.kind.name} frame without segment {kind.name}", cure=f"Send a segment {kind.name}"
        )
    return body


def _utf8(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"the text is no UTF-8 at byte {error.start}", cure="Send UTF-8") from None
