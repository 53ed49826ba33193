"""A demo's result in plain words; every number comes from the result."""

from kvferry.lab.arms import ARMS, family_of
from kvferry.lab.demo import DemoResult
from kvferry.lab.point import Point

_MEANINGS = {arm.name: arm.meaning for arm in ARMS} | {
    "sender_alone": "the sender answers itself, from the text: what is there to carry?"
}
CONTROLS = ("receiver_only", "kv_zeroed", "kv_mean", "kv_twin", "sender_alone")


def meaning(arm: str) -> str:
    """What an arm is, in one line; the name of one that an aligner brings says its step."""
    return _MEANINGS.get(arm, "the sender's cache, entropy coded")


def summary(result: DemoResult) -> list[str]:
    """Sentences on accuracy, on size, and on what a cache saves."""
    return [_accuracy(result), _size(result), _saving(result), _cost(result)]


def controls(result: DemoResult) -> list[str]:
    """One line for each control: what it asks, and what came out."""
    return [f"{arm}: {meaning(arm)} {_outcome(result.row(arm))}" for arm in CONTROLS]


def _accuracy(result: DemoResult) -> str:
    test = result.test("kv_int8", "text_full")
    low, high = (100 * edge for edge in test.ci95)
    return (
        f"Answering from the other model's int8 cache is right in {_percent(result.row('kv_int8').accuracy)} of items, "
        f"reading the text in {_percent(result.row('text_full').accuracy)}: a difference of "
        f"{100 * test.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {_said(test.verdict)}. "
        f"Guessing a word of the right type would be right in {_percent(result.chance)}."
    )


def _size(result: DemoResult) -> str:
    caches = (row for row in result.rows if family_of(row.arm) == "cache")
    smallest = min(caches, key=lambda row: row.n_bytes["message"]).arm
    arms = ("text_full", "text_zstd", "kv_int8", "kv_int4", smallest)
    text, packed, int8, int4, least = (_bytes(result, arm) for arm in arms)
    ratio = least / min(text, packed)
    comparison = (
        f"text is far smaller: even the smallest cache is {ratio:.0f} times larger"
        if ratio > 1
        else "text is larger"
    )
    return (
        f"In bytes {comparison}. One context as a message takes {text:,.0f} bytes as text, {packed:,.0f} as zstd, "
        f"{int8:,.0f} as int8 cache, {int4:,.0f} as int4 cache and {least:,.0f} as {smallest}. "
        f"Who counts bytes alone should send text."
    )


def _saving(result: DemoResult) -> str:
    cache, text = (until_first_token(result.row(arm)) for arm in ("kv_int8", "text_full"))
    verdict = (
        f"{text / cache:.1f} times faster"
        if cache < text
        else f"{cache / text:.1f} times slower, at this size"
    )
    return (
        f"What a cache saves is reading. The receiver took over {result.n_slots:.0f} tokens per item without "
        f"prefilling one of them, and without the text. Until its first token it worked {cache:.1f} ms with the int8 "
        f"cache ({_stages(result.row('kv_int8'))}) and {text:.1f} ms with the text: {verdict}."
    )


def _cost(result: DemoResult) -> str:
    times = result.row("kv_int8").latency_ms
    return (
        f"What it costs: the sender reads in {times['capture']:.1f} ms and codes in {times['encode']:.1f} ms, once for "
        f"any number of receivers and questions, and an aligner must have been fitted for the pair."
    )


def until_first_token(row: Point) -> float:
    """Milliseconds that the receiver works before it can say the first token."""
    return sum(row.latency_ms.get(stage, 0.0) for stage in ("decode", "align", "prefill"))


def _stages(row: Point) -> str:
    return ", ".join(f"{stage} {row.latency_ms[stage]:.1f}" for stage in ("decode", "align", "prefill"))


def _outcome(row: Point) -> str:
    own = _percent(row.accuracy)
    if row.arm != "kv_twin":
        return f"Right in {own}."
    return f"The twin's answer comes in {_percent(row.metrics['follows_payload'] or 0.0)}, the item's own in {own}."


def _said(verdict: str) -> str:
    return {"a better": "the cache is better", "b better": "the text is better"}.get(verdict, "undecided")


def _bytes(result: DemoResult, arm: str) -> float:
    return result.row(arm).n_bytes["message"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
