"""Random caps on random selections of random small caches: kept to the byte, or refused with a cap that would do.

    python -m selection_caps --draws 100000 --jobs 2

run in the folder of tests, prints how many of the draws kept the promise.
"""

from dataclasses import dataclass

import numpy as np

from draws import all_draws
from kvferry.codec import CODECS, Codec
from kvferry.errors import BudgetTooSmall
from kvferry.select import SELECTORS
from kvferry.select.contract import Selector
from kvferry.select.sight import Sight
from kvferry.session.selecting import frame_of
from kvferry.wire import pack
from sights import OF_LAYERS, OF_TOKENS, drawn

_ALLOCATED = 0.2
"""Of the draws: classes are chosen too."""
_CODECS = ["int(bits=8)", "int(bits=4, group=3)", "nf4", "ecsq", "raw(float16)"]


@dataclass(frozen=True)
class Draw:
    """A cache of up to 24 slots, a selector, a codec and a cap, all of them from one seed."""

    seed: int

    def make(self) -> tuple[Sight, Selector, Codec, int]:
        random = np.random.default_rng(self.seed)
        shapes = (tuple(int(n) for n in random.integers(1, 6, 3)),) * int(random.integers(1, 5))
        n_slots = int(random.integers(2, 25))
        roles = random.integers(0, 3, n_slots).astype(np.uint8)
        roles[0] = 0  # No scope is empty.
        sight = drawn(n_slots, int(random.integers(0, 3)), shapes, self.seed, roles)
        cap = int(2 ** random.uniform(4, 13))
        if random.random() < _ALLOCATED:
            codec = CODECS.parse(str(random.choice(["ecsq", "mixed", "mixed(int8_int4)"])))
            return sight, SELECTORS.parse("lagrangian"), codec, cap
        return sight, self._selector(random), CODECS.parse(str(random.choice(_CODECS))), cap

    def _selector(self, random: np.random.Generator) -> Selector:
        spec = str(random.choice([*OF_TOKENS, *OF_LAYERS, "all", "adaptive(inner=vnorm)"]))
        scope = str(random.choice(["all_context", "prompt", "instruction_only"]))
        config = {**SELECTORS.parse(spec).to_json(), "scope": scope}
        if spec in OF_TOKENS:
            config["proportion"] = float(random.choice([1.0, 0.5, random.uniform(0.01, 1.0)]))
            config["min_tokens"] = int(random.choice([1, 1, 3, 30]))
            config["sinks"] = int(random.integers(0, 3))
            config["per_layer"] = bool(random.random() < 0.3)
        return SELECTORS.from_json(config)


def check_draw(draw: Draw) -> bool:
    """Raise `AssertionError` unless the cap is kept, or the one that `BudgetTooSmall` names; whether it was kept."""
    sight, selector, codec, cap = draw.make()
    try:
        size, wanted = _size(sight, selector, codec, cap), cap
    except BudgetTooSmall as error:
        wanted = error.smallest_bytes
        size = _size(sight, selector, codec, wanted)
    if size > wanted or wanted < cap:
        raise AssertionError(f"{draw}: {size} bytes, the cap is {cap}, or {wanted}")
    return wanted == cap


def _size(sight: Sight, selector: Selector, codec: Codec, cap: int) -> int:
    return len(pack(frame_of(codec, selector, sight, cap)))


def check_range(seeds: range) -> int:
    """How many of the draws kept their cap."""
    return sum(map(_check_seed, seeds))


def _check_seed(seed: int) -> bool:
    return check_draw(Draw(seed))


def main() -> None:
    kept = all_draws(_check_seed, __doc__)
    print(f"{len(kept)} draws: all kept, {len(kept) - sum(kept)} of them refused with a cap that works")  # noqa: T201


if __name__ == "__main__":
    main()
