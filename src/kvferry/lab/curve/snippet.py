"""The sentences of a text that a question is about, by the words they share: BM25 (Robertson and Zaragoza, 2009).

What retrieval would send instead of a cache, and the fair rival of every selector that knows the question.
"""

import math
import re
from collections import Counter

_K1, _B = 1.5, 0.75


def sentences(text: str) -> list[str]:
    """In order, each with its full stop.

    >>> sentences("Ann has tea. Ben met Cleo.")
    ['Ann has tea.', 'Ben met Cleo.']
    """
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def snippet(text: str, question: str, n_bytes: int) -> str | None:
    """The best sentences that fit into so many bytes, in the order of the text; None where not one fits.

    >>> snippet("Ann has tea in Oslo. Ben has salt in Rome. Dan is ill.", "Where is the salt?", 40)
    'Ben has salt in Rome. Dan is ill.'
    """
    parts = sentences(text)
    scores = bm25(parts, question)
    chosen: list[int] = []
    for index in sorted(range(len(parts)), key=lambda index: -scores[index]):
        if len(_text(parts, [*chosen, index]).encode()) <= n_bytes:
            chosen.append(index)
    return _text(parts, chosen) if chosen else None


def bm25(parts: list[str], question: str) -> list[float]:
    """The score of each sentence, the others being the collection."""
    counted = [Counter(_words(part)) for part in parts]
    mean = sum(count.total() for count in counted) / max(len(counted), 1)
    rarity = {word: _rarity(sum(word in count for count in counted), len(parts)) for word in _words(question)}
    return [sum(rarity[word] * _share(count, word, mean) for word in rarity) for count in counted]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _rarity(n_with: int, n: int) -> float:
    return math.log(1 + (n - n_with + 0.5) / (n_with + 0.5))


def _share(count: Counter[str], word: str, mean: float) -> float:
    length = 1 - _B + _B * count.total() / mean
    return count[word] * (_K1 + 1) / (count[word] + _K1 * length)


def _text(parts: list[str], chosen: list[int]) -> str:
    return " ".join(parts[index] for index in sorted(chosen))
