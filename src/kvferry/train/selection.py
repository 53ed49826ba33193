"""Selections that a map is trained behind: what is kept of each context's cache, closed up as in a message."""

from dataclasses import replace

from kvferry.errors import UsageError
from kvferry.kv import KV, stack
from kvferry.select import SELECTORS
from kvferry.select.all import All
from kvferry.select.contract import Selector, TokenSelector
from kvferry.select.sight import alone


def selection_of(spec: str) -> Selector:
    """A selector that decides by the cache alone.

    Raises what the table raises for text that is no selector, `UsageError` for one that looks at queries or the
    question, or chooses layers: a map loses a token that any layer lacks.
    """
    selector = SELECTORS.parse(spec)
    if not isinstance(selector, TokenSelector | All) or selector.needs or selector.reads_question:
        cure = "Train behind selectors of tokens by the cache alone: all, random, knorm, vnorm, keydiff, back, ..."
        raise UsageError(f"a fit cannot train behind {selector.brief()}", cure=cure)
    return selector


def select(selector: Selector, kv: KV) -> KV:
    """What is left of each sequence of a batch, on the left padded anew."""
    if isinstance(selector, All) and selector.scope == "all_context":
        return kv
    return stack([_kept(selector, one) for one in kv.sequences()])


def _kept(selector: Selector, one: KV) -> KV:
    held = selector.plan(alone(one)).classes[:, :1] > 0
    return replace(one, present=held).take_tokens(held.any(0)[0].nonzero().flatten())
