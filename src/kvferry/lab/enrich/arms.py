"""One seed: fusers are trained, and every arm answers the same items.

An arm says with what the receiver goes on from its own prompt. The receiver's own reading is the same in all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry.fuse.residual import Contribution, enriched
from kvferry.lab.enrich.controls import averaged, closed, of_twins, zeroed
from kvferry.lab.enrich.settings import KIND, Settings
from kvferry.lab.enrich.texts import PLACES, answered, best_place, sentence_alone, told
from kvferry.lab.items import Batch, Worlds, right
from kvferry.lab.run import MAX_NEW_TOKENS
from kvferry.models.enrich import go_on
from kvferry.models.generate import generate
from kvferry.models.load import Model
from kvferry.train.both_read import Both, BothRead
from kvferry.train.fuser_fit import FittedFuser, fit_fuser
from kvferry.train.sources.items import Items, example_of

Added = Callable[[BothRead], list[Contribution]]
"""What is added to the receiver's own cache."""

N_SINGLE = 20
_N_WARM = 3  # first calls allocate; they are not counted


@dataclass(frozen=True)
class Marks:
    """Which items an arm has right; `twin`: for which it gives the answer of the item's twin."""

    own: NDArray[np.int64]
    twin: NDArray[np.int64]


@dataclass(frozen=True)
class Seed:
    """What one seed gave: marks by arm, the fusers by the arm that shows them, milliseconds of fusing one prompt."""

    marks: dict[str, Marks]
    fitted: dict[str, FittedFuser]
    fuse_ms: dict[str, float]


@dataclass(frozen=True)
class Pair:
    """The models of the bench, loaded once, and where the receiver is best told the sender's answer."""

    sender: Model
    receiver: Model
    place: str

    @classmethod
    def of(cls, sender: Model, receiver: Model, n_facts: int) -> "Pair":
        return cls(sender, receiver, best_place(sender, receiver, KIND, n_facts))


def run_seed(pair: Pair, settings: Settings, seed: int, on_part: Callable[[str], None]) -> Seed:
    """Train all fusers of a seed, then ask all arms."""
    batches = Worlds((KIND,), settings.n_facts).twins(settings.n_items, seed)
    fitted = _fitted(pair, settings, seed, on_part)
    on_part(f"seed {seed}: asking")
    texts = {name: _marked(texts, batches) for name, texts in _text_arms(pair, batches).items()}
    prompt, context = (_read(Both(pair.sender, pair.receiver, hears), batches) for hears in _HEARD)
    same = _read(Both(pair.receiver, pair.receiver), batches)
    ours = fitted[settings.ours]
    read = {name: same if name == "same_model" else prompt for name in fitted} | {"context_only": context}
    marks = {name: _asked(pair, _plain(one), read[name], batches) for name, one in fitted.items()}
    marks |= {name: _asked(pair, add, prompt, batches) for name, add in _control_arms(ours).items()}
    singles = [Both(pair.sender, pair.receiver).read([example_of(i)]) for i in batches[0].items[:N_SINGLE]]
    timed = {name: fitted[name] for name in settings.fusers}
    return Seed(texts | marks, fitted, _fuse_ms(timed, singles))


_HEARD = ("prompt", "context")


def _fitted(
    pair: Pair, settings: Settings, seed: int, on_part: Callable[[str], None]
) -> dict[str, FittedFuser]:
    sender, receiver, ours = pair.sender, pair.receiver, settings.ours
    wanted = {name: (sender, settings.recipe(name, seed)) for name in settings.fusers}
    wanted["same_model"] = (receiver, settings.recipe(ours, seed))
    wanted["context_only"] = (sender, settings.recipe(ours, seed, "context"))
    found = {}
    for name, (heard, recipe) in wanted.items():
        on_part(f"seed {seed}: training {name}")
        found[name] = fit_fuser(heard, receiver, Items(KIND, settings.n_facts), recipe)
    return found


def _plain(fitted: FittedFuser) -> Added:
    return lambda read: [(fitted.fuser, read.arrived)]


def _control_arms(ours: FittedFuser) -> dict[str, Added]:
    """Of the first fuser: what it does with other numbers, and the receiver by itself."""
    fuser, shut = ours.fuser, closed(ours.fuser)
    return {
        "receiver_only": lambda read: [],
        "closed_gates": lambda read: [(shut, read.arrived)],
        "zeroed": lambda read: [(fuser, zeroed(read.arrived))],
        "mean": lambda read: [(fuser, averaged(read.arrived))],
        "twin": lambda read: [(fuser, of_twins(read.arrived))],
    }


def _text_arms(pair: Pair, batches: Sequence[Batch]) -> dict[str, list[str]]:
    sender, receiver = pair.sender, pair.receiver
    ways = {"text_to_text": PLACES[pair.place], "answer_passed_on": sentence_alone}
    found = {
        name: [text for batch in batches for text in told(sender, receiver, batch.items, how)]
        for name, how in ways.items()
    }
    alone = [text for batch in batches for text in answered(sender, batch.contexts, batch.questions)]
    return found | {"sender_only": alone}


def _read(both: Both, batches: Sequence[Batch]) -> list[BothRead]:
    return [both.read([example_of(item) for item in batch.items]) for batch in batches]


def _asked(pair: Pair, add: Added, read: Sequence[BothRead], batches: Sequence[Batch]) -> Marks:
    texts = [text for one in read for text in fused_answers(pair.receiver, one, add(one))]
    return _marked(texts, batches)


@torch.no_grad()
def fused_answers(receiver: Model, read: BothRead, added: Sequence[Contribution]) -> list[str]:
    """The receiver's answers, going on from its own prompt and what is added to it."""
    state, logits = go_on(read.prompted, read.last, added)
    stop = receiver.prompt.stop
    answers = generate(state, logits[:, -1], max_new_tokens=MAX_NEW_TOKENS, stop=stop)
    return [answer.text.strip() for answer in answers]


def _marked(texts: Sequence[str], batches: Sequence[Batch]) -> Marks:
    own = [answer for batch in batches for answer in batch.answers]
    twin = [answer for batch in batches for answer in batch.twins.answers]
    return Marks(right(texts, own), right(texts, twin))


@torch.no_grad()
def _fuse_ms(fitted: dict[str, FittedFuser], singles: Sequence[BothRead]) -> dict[str, float]:
    """Median time of fusing one prompt. Fusers take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in fitted}
    for read in singles:
        for name, one in fitted.items():
            begun = time.perf_counter()
            enriched(read.prompted.own, [(one.fuser, read.arrived)])
            times[name].append((time.perf_counter() - begun) * 1e3)
    return {name: median(found[_N_WARM:] or found) for name, found in times.items()}
