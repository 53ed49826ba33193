"""Random caps on random small caches: kept to the byte, or refused with a cap that would do.

    python -m caps --draws 100000 --jobs 2

run in the folder of tests, prints how many of the draws kept the promise and how much of a cap stays unused.
"""

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

import contract
from draws import all_draws
from kvferry.codec.ecsq import Ecsq
from kvferry.errors import BudgetTooSmall
from kvferry.kv import KV, Plan
from kvferry.wire import Frame, pack

_LARGE = 2_000
"""Caps from which the share that stays unused counts."""


@dataclass(frozen=True)
class Draw:
    """A cache of up to 64 tokens, a codec and a cap, all of them from one seed."""

    seed: int

    def make(self) -> tuple[KV, Plan | None, Ecsq, int]:
        random = np.random.default_rng(self.seed)
        shapes = tuple(tuple(int(n) for n in random.integers(1, 9, 3)) for _ in range(random.integers(1, 5)))
        n_tokens = int(random.integers(0, 65))
        holes = random.choice([0.0, 0.0, 0.3])
        present = torch.from_numpy(random.random((len(shapes), 1, n_tokens)) >= holes)
        scale = float(random.choice([1e-3, 1.0, 50.0]))
        kv = contract.cache(shapes, n_tokens, present=present, seed=self.seed, scale=scale)
        plan = Plan.everything(kv) if random.random() < 0.3 else None
        if plan is not None:
            shape = tuple(plan.classes.shape)
            plan = Plan(torch.from_numpy(random.integers(1, 4, shape).astype(np.uint8)))
        codec = Ecsq(int(random.choice([-512, -256, -64])), str(random.choice(["layer", "part", "frame"])))
        return kv, plan, codec, int(2 ** random.uniform(4, 14))


@dataclass(frozen=True)
class Outcome:
    """`used` bytes of a cap, 0 if it was too small. `capped`: the cap made the step coarser."""

    cap: int
    used: int
    capped: bool


def check_draw(draw: Draw) -> Outcome:
    """Raise `AssertionError` unless the cap is kept, or the one that `BudgetTooSmall` names."""
    kv, plan, codec, cap = draw.make()
    try:
        frame, wanted = codec.encode(kv, plan, cap), cap
    except BudgetTooSmall as error:
        wanted = error.smallest_bytes
        frame = codec.encode(kv, plan, wanted)
    if _size(frame) > wanted or wanted < cap:
        raise AssertionError(f"{draw}: {_size(frame)} bytes, the cap is {cap}, or {wanted}")
    return Outcome(cap, _size(frame) if wanted == cap else 0, frame.step > codec.step)


def _size(frame: Frame) -> int:
    return len(pack(frame))


def _check_seed(seed: int) -> Outcome:
    return check_draw(Draw(seed))


def main() -> None:
    outcomes = all_draws(_check_seed, __doc__)
    unused = [1 - one.used / one.cap for one in outcomes if one.capped and one.used and one.cap >= _LARGE]
    small = sum(not one.used for one in outcomes)
    print(f"{len(outcomes)} draws: all kept, {small} of them refused with a cap that works")  # noqa: T201
    print(  # noqa: T201
        f"unused at caps of {_LARGE} bytes or more that bind: median {median(unused):.3%} of {len(unused)}"
    )


if __name__ == "__main__":
    main()
