"""How much of the attention that a query pays is paid to the slots that somebody would have kept for it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.metrics.attention import softmax_seen
from kvferry.select.indexer import Indexer
from kvferry.train.attended import Attended

PROPORTIONS = (0.1, 0.25)
WINDOW = 16
"""Last queries that are looked at together."""
_LEAST_KEPT = 2
"""A query that keeps one slot only says more about luck than about an order."""
FEWEST_TOKENS = int((_LEAST_KEPT - 1) / min(PROPORTIONS)) + 1
"""Of a text whose last query keeps enough slots at every proportion."""

Scorer = Callable[[Attended, int, int], Float[Tensor, "batch new tokens"]]
"""Scores of all tokens for the last `n_last` queries of a layer: (attended, layer, n_last)."""


def of_indexer(indexer: Indexer) -> Scorer:
    return lambda seen, layer, n_last: indexer(layer, seen.states(layer), seen.positions, n_last)


def random_scores(seen: Attended, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
    generator = torch.Generator(seen.positions.device).manual_seed(layer)
    shape = (seen.kv.n_batch, n_last, seen.n_tokens)
    return torch.rand(shape, generator=generator, device=seen.positions.device)


def recent(seen: Attended, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
    """The last slots before each query: what needs no model at all."""
    return _alike(seen.positions.float() / seen.n_tokens, n_last)


def short_keys(seen: Attended, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
    """As `knorm` scores slots."""
    return _alike(-seen.content_keys(layer).norm(dim=-1).mean(1), n_last)


def unlike_keys(seen: Attended, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
    """As `keydiff` scores slots: minus the cosine to the mean unit key of the text."""
    present = seen.kv.present[layer]
    units = torch.nn.functional.normalize(seen.content_keys(layer), dim=-1) * present[:, None, :, None]
    centre = units.sum(2, keepdim=True) / present.sum(-1)[:, None, None, None]
    return _alike(-torch.cosine_similarity(units, centre, dim=-1).mean(1), n_last)


CONTROLS: Mapping[str, Scorer] = {
    "random": random_scores,
    "recent": recent,
    "knorm": short_keys,
    "keydiff": unlike_keys,
}
"""What an order of slots is worth that looks at no query."""


def _alike(of_tokens: Float[Tensor, "batch tokens"], n_last: int) -> Float[Tensor, "batch new tokens"]:
    return of_tokens.unsqueeze(1).expand(-1, n_last, -1)


def mass_held(
    scores: Float[Tensor, "batch new tokens"],
    shares: Float[Tensor, "batch new tokens"],
    visible: Bool[Tensor, "batch new tokens"],
    proportion: float,
) -> Float[Tensor, "batch new"]:
    """The attention on the k slots of highest score over that on the best k: `proportion` of those seen, rounded up.

    >>> shares = torch.tensor([[[0.6, 0.3, 0.1, 0.0]]])
    >>> scores, visible = torch.tensor([[[0.0, 2.0, 1.0, 9.0]]]), torch.tensor([[[True, True, True, False]]])
    >>> round(mass_held(scores, shares, visible, 0.5).item(), 3)
    0.444
    """
    order = scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    got = shares.gather(-1, order).cumsum(-1)
    best = shares.sort(dim=-1, descending=True).values.cumsum(-1)
    last = (n_kept(visible, proportion) - 1).clamp(min=0).unsqueeze(-1)
    tiny = torch.finfo(best.dtype).tiny
    return (got.gather(-1, last) / best.gather(-1, last).clamp(min=tiny)).squeeze(-1)


def n_kept(visible: Bool[Tensor, "batch new tokens"], proportion: float) -> Tensor:
    return (visible.sum(-1) * proportion - 1e-6).ceil().long()


@dataclass(frozen=True)
class Held:
    """The median share by layer: over queries, each with slots of its own, and over windows of last queries."""

    name: str
    proportion: float
    queries: tuple[float, ...]
    windows: tuple[float, ...]
    n_queries: int

    @property
    def lowest(self) -> float:
        """That of the worst layer."""
        return min(self.queries)

    @property
    def typical(self) -> float:
        """The median over layers."""
        return median(self.queries)


@torch.no_grad()
def measure(scorers: Mapping[str, Scorer], texts: Iterable[Attended]) -> list[Held]:
    """Medians of all scorers on the same queries: those of the later half of each text, that keep two slots or more."""
    found: dict[tuple[str, float, int, str], list[Tensor]] = {}
    n_layers = 0
    for seen in texts:
        n_layers = seen.kv.geometry.n_layers
        for layer in range(n_layers):
            for key, values in _of_layer(scorers, seen, layer):
                found.setdefault((*key[:2], layer, key[2]), []).append(values)
    joined = {key: torch.cat(values) for key, values in found.items()}

    def medians(name: str, proportion: float, what: str) -> tuple[float, ...]:
        of_layers = (joined[name, proportion, layer, what] for layer in range(n_layers))
        return tuple(one.median().item() for one in of_layers)

    return [
        Held(
            name,
            proportion,
            medians(name, proportion, "queries"),
            medians(name, proportion, "windows"),
            len(joined[name, proportion, 0, "queries"]),
        )
        for proportion in PROPORTIONS
        for name in scorers
    ]


def _of_layer(
    scorers: Mapping[str, Scorer], seen: Attended, layer: int
) -> Iterable[tuple[tuple[str, float, str], Tensor]]:
    n_last = max(seen.n_tokens // 2, min(WINDOW, seen.n_tokens))
    shares, visible = seen.shares(layer, n_last), seen.visible(layer, n_last)
    late = seen.positions[:, -n_last:] * 2 >= seen.kv.present[layer].sum(-1, keepdim=True)
    for name, scorer in scorers.items():
        scores = scorer(seen, layer, n_last).float()
        expected = softmax_seen(scores.unsqueeze(1), visible, None)[:, 0]
        window = [_window(one) for one in (expected, shares, visible)]
        for proportion in PROPORTIONS:
            counted = late & (n_kept(visible, proportion) >= _LEAST_KEPT)
            yield (name, proportion, "queries"), mass_held(scores, shares, visible, proportion)[counted]
            held = mass_held(window[0], window[1], window[2] > 0, proportion)
            yield (name, proportion, "windows"), held.flatten()


def _window(of_queries: Tensor) -> Tensor:
    """What the last queries say together."""
    return of_queries[:, -WINDOW:].float().mean(1, keepdim=True)
