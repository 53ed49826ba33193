"""Sights for the tests of selectors: drawn ones with all there is to look at, and those of real tiny models."""

from dataclasses import replace

import torch

import contract
from kvferry.kv import KV, Evidence, Group
from kvferry.metrics.attention import Scores
from kvferry.models.capture import capture
from kvferry.models.scores import scores_of
from kvferry.select.sight import Asked, Sight
from tiny import model_of, tokens_of

UNEQUAL = ((2, 4, 6),) * 3
"""Keys and values of different dims."""
BY_PLACE = ["back", "front", "middle", "random", "sinks_recent"]
BY_CACHE = ["keydiff", "knorm", "knorm(keep=high)", "vnorm"]
BY_READOUT = ["delta", "oracle_delta", "proj_vnorm"]
BY_ATTENTION = [
    "attention_mass",
    "expected_attention(n_future=16, sinks=0)",
    "question",
    "question(reduce=mean, pool=3)",
    "snapkv(window=4, pool=3)",
    "tova",
    "value_aware",
]
BY_CONTENT = [*BY_CACHE, *BY_READOUT, *BY_ATTENTION]
OF_TOKENS = [*BY_PLACE, *BY_CONTENT]
OF_LAYERS = ["every_kth", "kvcomm(window=4)", "sensitive_layers(window=4)"]


def drawn(n_slots=9, n_head=2, shapes=UNEQUAL, seed=0, roles=None) -> Sight:
    """A sight after `n_head` tokens that are not sent, with every kind of evidence; two query heads on a key head."""
    n_tokens, generator = n_slots + n_head, torch.Generator().manual_seed(seed)
    read = contract.cache(shapes, n_tokens, seed=seed)
    kv = read.take_tokens(torch.arange(n_head, n_tokens))
    if roles is not None:
        kv = replace(kv, spans=(contract.spans(n_slots, roles),))

    def queries(n: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(1, 2 * heads, n, dim, generator=generator) for heads, dim, _ in shapes)

    mass = tuple(torch.rand(1, heads, n_tokens, generator=generator) for heads, _, _ in shapes)
    return Sight(
        kv=kv,
        read=read,
        carried=torch.eye(n_tokens, dtype=torch.bool)[n_head:],
        evidence=Evidence(queries_content=queries(n_tokens), attention_mass=mass),
        scores=(Scores(0.5),) * len(shapes),
        asked=Asked(queries(3), n_tokens + torch.arange(3).unsqueeze(0)),
        readout=mirrored,
        base=contract.cache(shapes, n_slots, seed=seed + 1),
    )


def mirrored(kv: KV) -> KV:
    """The same slots as a receiver of the same geometry may see them."""
    return kv.with_groups(tuple(Group(g.layers, -g.keys, -2 * g.values) for g in kv.groups))


def seen_by(name: str, rows: list[list[int]], asked: list[list[int]] | None = None) -> list[Sight]:
    """What a tiny model saw of each row, read as one batch; the first token of each is a head that is not sent."""
    model = model_of(name)
    found = capture(model, tokens_of(rows), ("queries_content", "attention_mass"))
    scores = scores_of(model)
    sights = []
    for row in range(len(rows)):
        whole = found.kv.take_batch([row])
        held = whole.present[0, 0].nonzero().flatten()
        read = whole.take_tokens(held)
        carried = torch.eye(len(held), dtype=torch.bool)[1:]
        kv = read.take_tokens(torch.arange(1, len(held)))
        question = None if asked is None else asked_of(name, rows[row], asked[row])
        sights.append(
            Sight(kv, read, carried, found.evidence.sequence(row, held), scores, question, readout=mirrored)
        )
    return sights


def asked_of(name: str, context: list[int], question: list[int]) -> Asked:
    """The queries of a question read after its context."""
    found = capture(model_of(name), tokens_of([[*context, *question]]), ("queries_content",))
    at = torch.arange(len(context), len(context) + len(question))
    return Asked(found.evidence.sequence(0, at).queries_content, at.unsqueeze(0))


def permuted(sight: Sight, order: torch.Tensor) -> Sight:
    """The same slots in another order; what was read stays."""
    base = None if sight.base is None else sight.base.take_tokens(order)
    return replace(sight, kv=sight.kv.take_tokens(order), carried=sight.carried[order], base=base)


def scaled(sight: Sight, keys: float, values: float) -> Sight:
    """Keys and values that are longer, at the sender and at the receiver."""

    def longer(kv: KV) -> KV:
        return kv.with_groups(tuple(Group(g.layers, keys * g.keys, values * g.values) for g in kv.groups))

    base = None if sight.base is None else longer(sight.base)
    return replace(sight, kv=longer(sight.kv), read=longer(sight.read), base=base)
